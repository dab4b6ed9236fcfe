"""The spectral basis of one frozen weight: solve it, orient it, apply it. Knows torch and scipy, nothing of PEFT."""

from pica.basis._precision import full_precision as full_precision
from pica.basis._progress import solve_many as solve_many
from pica.basis._progress import with_progress as with_progress
from pica.basis._split import Holdings as Holdings
from pica.basis._split import alone as alone
from pica.basis._split import process_count as process_count
from pica.basis._split import process_index as process_index
from pica.basis._split import wire_device as wire_device
from pica.basis.cache import cached_solve_basis as cached_solve_basis
from pica.basis.decomposition import Factorisation as Factorisation
from pica.basis.decomposition import factorise as factorise
from pica.basis.orient import direction_signs as direction_signs
from pica.basis.request import BasisRequest as BasisRequest
from pica.basis.spectral import CALIBRATED as CALIBRATED
from pica.basis.spectral import OF_INPUTS as OF_INPUTS
from pica.basis.spectral import PROJECTIONS as PROJECTIONS
from pica.basis.spectral import Basis as Basis
from pica.basis.spectral import Side as Side
from pica.basis.spectral import WantedSide as WantedSide
from pica.basis.spectral import max_rank as max_rank
from pica.basis.spectral import solve_basis as solve_basis

__all__ = [
    "CALIBRATED",
    "OF_INPUTS",
    "PROJECTIONS",
    "Basis",
    "BasisRequest",
    "Factorisation",
    "Holdings",
    "Side",
    "WantedSide",
    "alone",
    "cached_solve_basis",
    "direction_signs",
    "factorise",
    "full_precision",
    "max_rank",
    "process_count",
    "process_index",
    "solve_basis",
    "solve_many",
    "wire_device",
    "with_progress",
]
