"""The statements of the PiCa paper as functions of weights: each returns both sides of its inequality, in float64.

| paper | function |
|---|---|
| Lemma 3.1 (Wedin) | `wedin` |
| Theorem 1 (projection error), E_P and E_Q, Figure 2 | `projection_error`, `perturbations`, `first_order_perturbations` |
| Theorem 2 (sequential projection) | `sequential_projection`, `sequential_bound` |
| appendix: Weyl, norm invariance, non-expansiveness | `weyl`, `mirsky`, `norm_invariance`, `non_expansiveness` |

Weights are PyTorch's (out, in), the transpose of the paper's: its "column space U_r" is the span of the top RIGHT singular
vectors of a PyTorch weight. Knows torch, nothing of PEFT or transformers.
"""

from pica.theory.bounds import Inequality as Inequality
from pica.theory.bounds import WedinBound as WedinBound
from pica.theory.bounds import mirsky as mirsky
from pica.theory.bounds import non_expansiveness as non_expansiveness
from pica.theory.bounds import norm_invariance as norm_invariance
from pica.theory.bounds import wedin as wedin
from pica.theory.bounds import weyl as weyl
from pica.theory.diagnostics import INTRUDER_THRESHOLD as INTRUDER_THRESHOLD
from pica.theory.diagnostics import INTRUDER_TOP as INTRUDER_TOP
from pica.theory.diagnostics import captured_energy as captured_energy
from pica.theory.diagnostics import direction_energies as direction_energies
from pica.theory.diagnostics import effective_rank as effective_rank
from pica.theory.diagnostics import intruder_dimensions as intruder_dimensions
from pica.theory.diagnostics import rank_for_share as rank_for_share
from pica.theory.diagnostics import spectrum_rank as spectrum_rank
from pica.theory.diagnostics import stable_rank as stable_rank
from pica.theory.projection import Perturbations as Perturbations
from pica.theory.projection import ProjectionError as ProjectionError
from pica.theory.projection import first_order_perturbations as first_order_perturbations
from pica.theory.projection import perturbations as perturbations
from pica.theory.projection import projection_error as projection_error
from pica.theory.sequential import SequentialProjection as SequentialProjection
from pica.theory.sequential import sequential_bound as sequential_bound
from pica.theory.sequential import sequential_projection as sequential_projection
from pica.theory.subspaces import Spectrum as Spectrum
from pica.theory.subspaces import principal_angles as principal_angles
from pica.theory.subspaces import random_directions as random_directions
from pica.theory.subspaces import sines as sines
from pica.theory.subspaces import spectrum as spectrum

__all__ = [
    "INTRUDER_THRESHOLD",
    "INTRUDER_TOP",
    "Inequality",
    "Perturbations",
    "ProjectionError",
    "SequentialProjection",
    "Spectrum",
    "WedinBound",
    "captured_energy",
    "direction_energies",
    "effective_rank",
    "first_order_perturbations",
    "intruder_dimensions",
    "mirsky",
    "non_expansiveness",
    "norm_invariance",
    "perturbations",
    "principal_angles",
    "projection_error",
    "random_directions",
    "rank_for_share",
    "sequential_bound",
    "sequential_projection",
    "sines",
    "spectrum",
    "spectrum_rank",
    "stable_rank",
    "wedin",
    "weyl",
]
