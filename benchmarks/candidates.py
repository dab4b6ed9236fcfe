"""What a PiCa layer could be besides M P x: candidates screened in short trainings, before any of them is built.

    python -m benchmarks.candidates --setting embedded --work /tmp/candidates
    python -m benchmarks.candidates --setting smollm2 --model smollm2-135m --data arithmetic --work /tmp/candidates
    python -m benchmarks.candidates ... --only "principal, gains;LoRA r=1"     these rows; several may share a folder
    python -m benchmarks.candidates ... --report            what there is so far

The same command goes on where another one was stopped. Every candidate has at most as many trained parameters as LoRA r=1 on
the same layers (q, k, v, up, down), the same steps and the same problems, and its rate from a grid that goes on where the
best one lies at its edge, chosen on validation problems with the first seed. Seeds decide the order of the problems (and
LoRA's A). Everything is compared with `activation` and with `principal` over the same seeds and test problems.

A candidate helps if it beats `activation` and `principal` both: the 95% interval of the difference lies below zero, and the
difference is at least 0.005 nats a token. It is a screen: small models, few steps. What helps here is worth a longer
comparison; what does not is not built.

| candidate | y = W x + ... | trained |
|---|---|---|
| LoRA r=1 | B A x | A, B of each layer |
| ... from activations, from gradient | B A x, A at first the leading direction of the inputs, of the first gradient | A, B |
| principal, activation | M P x | M (out, r) of each role |
| ... with gains | M (d * P x), d starting at one | M, and d (r) of each layer |
| principal, scaled | M S P x, S the singular values over their root mean square | M |
| activation, scaled; whitened | M S P x, S the directions' mean energies' root; its inverse | M |
| activation, shared by k | M P x with one M for each k neighbouring layers of a role, and fewer directions | M |
| residual side, outputs | q k v up: U N x, U the leading directions of the outputs; down: M P x | N (r, in), M |
| residual side, gradient | the same with U and P from first gradients, aligned over the role's layers | N, M |
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import pica
from benchmarks import harness
from benchmarks.short_runs import (
    TRAININGS,
    Losses,
    Records,
    Row,
    Task,
    batch_of,
    begin,
    best_rate,
    losses,
    mean,
    paired_difference,
    setting_parser,
    train,
    weight_gradients,
)
from pica.calibration.collecting import MEMORY
from pica.calibration.gradients import gradient_directions
from pica.calibration.making import directions, target_layers
from pica.calibration.texts import Calibration
from pica.tuners.base.roles import role_of

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
CALIBRATION_ROWS = 64
"""Training problems that directions, energies and first gradients are of."""
TIE = 0.005
"""A smaller mean difference, in nats a token, is a tie in practice."""


class LowRank(nn.Module):
    """A frozen linear layer with an update of low rank: y = W x + (x R^T * d) L^T."""

    def __init__(self, base: nn.Module, read: Tensor, write: Tensor, gains: Tensor | None = None) -> None:
        """Args: base: the layer; read: R (r, in); write: L (out, r); gains: d (r), or None. What is trained is shared."""
        super().__init__()
        self.base, self.read, self.write, self.gains = base, read, write, gains

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        h = linear(x, self.read.to(x.dtype))
        h = h if self.gains is None else h * self.gains.to(x.dtype)
        return self.base(x) + linear(h, self.write.to(x.dtype))


@dataclass
class Looked:
    """What candidates see of the frozen model before training: its layers, and what the calibration problems make of them.

    Attributes:
        task: Model and problems.
        seed: Of the calibration problems' choice.
    """

    task: Task
    seed: int = 0
    _bases: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Sequence[Row]:
        """The calibration problems."""
        order = np.random.default_rng(self.seed).permutation(len(self.task.train))
        return [self.task.train[i] for i in order[:CALIBRATION_ROWS]]

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The adapted layers, by path."""
        modules = self.task.model.named_modules()
        return {path: m for path, m in modules if isinstance(m, nn.Linear) and path.endswith(TARGETS)}

    @cached_property
    def roles(self) -> dict[str, list[str]]:
        """Paths by role, in the model's order."""
        found: dict[str, list[str]] = {}
        for path in self.layers:
            found.setdefault(role_of(path), []).append(path)
        return found

    def basis(self, projection: str, r: int) -> dict[str, Tensor]:
        """P (r, in) of each layer, float32."""
        if (projection, r) not in self._bases:
            config: Any = pica.PicaConfig(r=r, projection=projection, target_modules=list(TARGETS))  # pyright: ignore[reportArgumentType]
            read = Calibration([{"input_ids": torch.tensor([row["input_ids"]])} for row in self.rows], {})
            model = self.task.fresh()
            with target_layers(model, config) as layers:
                self._bases[projection, r] = directions(model, layers, config, read, seed=self.seed)
        return self._bases[projection, r]

    def energies(self, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean of (p_i x)^2 over the calibration problems' tokens, (r,), of each layer's directions."""
        sums = {path: torch.zeros(len(rows), dtype=torch.float64) for path, rows in of.items()}

        def note(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                sums[path] += linear(inputs[0].float(), of[path]).double().square().flatten(0, -2).sum(0)

            return hook

        handles = [self.layers[path].register_forward_pre_hook(note(path)) for path in of]
        with torch.no_grad():
            for row in self.rows:
                self.task.model(torch.tensor([row["input_ids"]]))
        for handle in handles:
            handle.remove()
        tokens = sum(len(row["input_ids"]) for row in self.rows)
        return {path: (total / tokens).float() for path, total in sums.items()}

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """G (out, in) of each layer: of the mean loss on the calibration problems, float32."""
        return weight_gradients(self.task.model, self.layers, self.rows)

    def output_directions(self, r: int) -> dict[str, Tensor]:
        """U (out, r): the leading eigenvectors of W C W^T, C the inputs' uncentred second moment."""
        moments = {
            path: torch.zeros(m.out_features, m.out_features, dtype=torch.float64) for path, m in self.layers.items()
        }

        def note(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
                rows = y.flatten(0, -2).double()
                moments[path] += rows.T @ rows

            return hook

        handles = [self.layers[path].register_forward_hook(note(path)) for path in self.layers]
        with torch.no_grad():
            for row in self.rows:
                self.task.model(torch.tensor([row["input_ids"]]))
        for handle in handles:
            handle.remove()
        return {path: torch.linalg.eigh(c).eigenvectors[:, -r:].flip(1).float() for path, c in moments.items()}


Made = tuple[dict[str, LowRank], list[nn.Parameter]]
"""The adapted layers by path, and all that is trained."""


def shared_m(
    looked: Looked,
    r: int,
    read: Mapping[str, Tensor],
    *,
    gains: bool = False,
    neighbours: int | None = None,
) -> Made:
    """M (out, r) shared by a role's layers, or by each `neighbours` of them in a row."""
    made, trained = {}, []
    for paths in looked.roles.values():
        size = neighbours or len(paths)
        for start in range(0, len(paths), size):
            group = paths[start : start + size]
            matrix = nn.Parameter(torch.zeros(looked.layers[group[0]].out_features, r))
            trained.append(matrix)
            for path in group:
                d = nn.Parameter(torch.ones(r)) if gains else None
                trained += [] if d is None else [d]
                made[path] = LowRank(looked.layers[path], read[path], matrix, d)
    return made, trained


def scaled(rows: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Directions times scales whose mean square is made one, so that rates mean the same."""
    return {path: p * (scales[path] / scales[path].square().mean().sqrt())[:, None] for path, p in rows.items()}


def residual(looked: Looked, r: int, write: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> Made:
    """Layers that write into the residual stream share M behind frozen P; those that read it share N before frozen U."""
    made, trained = {}, []
    for role, paths in looked.roles.items():
        first = looked.layers[paths[0]]
        writes = role.endswith("down_proj")
        matrix = nn.Parameter(torch.zeros(first.out_features, r) if writes else torch.zeros(r, first.in_features))
        trained.append(matrix)
        for path in paths:
            parts = (read[path], matrix) if writes else (matrix, write[path])
            made[path] = LowRank(looked.layers[path], *parts)
    return made, trained


def of_gradients(looked: Looked, r: int) -> Made:
    """`residual` with the leading directions of the first gradients, aligned over each role's layers, as PiCa has them."""
    turned = [path for role, paths in looked.roles.items() if not role.endswith("down_proj") for path in paths]
    found = gradient_directions(
        looked.task.model,
        looked.layers,
        {path: (layer.out_features, layer.in_features) for path, layer in looked.layers.items()},
        [batch_of(looked.rows[start : start + 8]) for start in range(0, len(looked.rows), 8)],
        r,
        groups=list(looked.roles.values()),
        input_side=turned,
        memory=MEMORY,
    )
    return residual(looked, r, {path: rows.T for path, rows in found.items()}, found)


def of_outputs(looked: Looked, r: int) -> Made:
    """`residual` with the leading directions of the outputs, and of the inputs of down."""
    return residual(looked, r, looked.output_directions(r), looked.basis("activation", r))


def lora(looked: Looked, r: int, seed: int, begin: Mapping[str, Tensor] | None = None) -> Made:
    """LoRA with alpha = r and PEFT's start: A uniform as a linear layer's weight, or `begin` at the same size; B zero."""
    generator = torch.Generator().manual_seed(seed)
    made, trained = {}, []
    for path, layer in looked.layers.items():
        bound = layer.in_features**-0.5
        drawn = (torch.rand(r, layer.in_features, generator=generator) * 2 - 1) * bound
        a = nn.Parameter(drawn if begin is None else begin[path] * drawn.norm())
        b = nn.Parameter(torch.zeros(layer.out_features, r))
        made[path] = LowRank(layer, a, b)
        trained += [a, b]
    return made, trained


Make = Callable[[Looked, int, int], Made]
"""From what was looked at, r and a seed."""


def candidates(layers: int) -> dict[str, Make]:
    """All of them by name; `layers` is the number of blocks."""

    def plain(projection: str, *, gains: bool = False, neighbours: int | None = None) -> Make:
        return lambda looked, r, seed: shared_m(
            looked, r, looked.basis(projection, r), gains=gains, neighbours=neighbours
        )

    def by_singular_values(looked: Looked, r: int, seed: int) -> Made:
        rows = looked.basis("principal", r)
        gains = {path: (looked.layers[path].weight.float() @ p.T).norm(dim=0) for path, p in rows.items()}
        return shared_m(looked, r, scaled(rows, gains))

    def by_energies(power: float) -> Make:
        def make(looked: Looked, r: int, seed: int) -> Made:
            rows = looked.basis("activation", r)
            energies = looked.energies(rows)
            return shared_m(
                looked, r, scaled(rows, {path: e.clamp(min=1e-12) ** power for path, e in energies.items()})
            )

        return make

    return {
        "activation": plain("activation"),
        "principal": plain("principal"),
        "LoRA r=1": lora,
        "activation, gains": plain("activation", gains=True),
        "principal, gains": plain("principal", gains=True),
        "activation, whitened": by_energies(-0.5),
        "activation, scaled": by_energies(0.5),
        "principal, scaled": by_singular_values,
        f"activation, shared by {layers // 2}": plain("activation", neighbours=layers // 2),
        f"activation, shared by {layers // 3}": plain("activation", neighbours=layers // 3),
        "residual side, outputs": lambda looked, r, seed: of_outputs(looked, r),
        "residual side, gradient": lambda looked, r, seed: of_gradients(looked, r),
        "random": plain("random"),
        "LoRA r=1, from activations": lambda looked, r, seed: lora(looked, r, seed, looked.basis("activation", r)),
        "LoRA r=1, from gradient": lambda looked, r, seed: lora(
            looked,
            r,
            seed,
            {path: torch.linalg.svd(g, full_matrices=False)[2][:r] for path, g in looked.gradients.items()},
        ),
    }


def count(trained: Sequence[nn.Parameter]) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in trained)


def rank_for(looked: Looked, name: str, make: Make, budget: int) -> int:
    """The largest r within a budget of trained parameters: they grow by the same number with each."""
    if name.startswith("LoRA"):
        return 1
    return budget // count(make(looked, 1, 0)[1])


def put_on(model: nn.Module, made: Mapping[str, LowRank]) -> None:
    """Exchange layers of a model for adapted ones."""
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


SETTINGS: dict[str, dict[str, Any]] = {
    "embedded": {
        **TRAININGS["embedded"],
        "seeds": [0, 1, 2, 3],
        "rates": {"": [3e-3, 1e-2, 3e-2], "LoRA": [1e-2, 3e-2, 1e-1]},
    },
    "smollm2": {
        **TRAININGS["smollm2"],
        "seeds": [0, 1],
        "rates": {"": [1e-3, 3e-3, 1e-2], "LoRA": [3e-3, 1e-2, 3e-2]},
    },
}


def run(name: str, task: Task, setting: Mapping[str, Any], records: Records, only: Sequence[str] | None = None) -> None:
    """Train and measure what is not done yet, of all candidates or some: each one's rate, then its seeds."""
    looked = Looked(task)
    layers = max(len(paths) for paths in looked.roles.values())
    budget = count(lora(looked, 1, 0)[1])
    records.get(f"{name}/base", lambda: losses(task.model, task.test))
    for label, make in candidates(layers).items():
        if only is not None and label not in only:
            continue
        r = rank_for(looked, label, make, budget)
        rates = setting["rates"]["LoRA" if label.startswith("LoRA") else ""]

        def attempt(
            rate: float, seed: int, rows: Sequence[Row], make: Make = make, r: int = r
        ) -> tuple[int, Losses | None]:
            model, (made, trained) = task.fresh(), make(looked, r, seed)
            put_on(model, made)
            return count(trained), losses(model, rows) if train(model, trained, task, rate=rate, seed=seed) else None

        def validated(rate: float, label: str = label, attempt: Any = attempt, r: int = r) -> float:
            def both() -> dict[str, Any]:
                parameters, found = attempt(rate, setting["seeds"][0], [*task.validation, *task.test])
                part = len(task.validation)
                halves = (found[:part], found[part:]) if found else (None, None)
                return {"parameters": parameters, "r": r, "validation": halves[0], "test": halves[1]}

            done = records.get(f"{name}/{label}/rate {rate:g}", both)
            print(f"{label} r={r}, rate {rate:g}: {_shown(done['validation'])}", flush=True)
            return mean(done["validation"]) if done["validation"] else float("inf")

        rate, tried = best_rate(rates, validated)
        chosen = records.done(f"{name}/{label}/rate {rate:g}")
        seeds = {setting["seeds"][0]: chosen["test"]}
        for seed in setting["seeds"][1:]:
            seeds[seed] = records.get(
                f"{name}/{label}/seed {seed}", lambda s=seed, at=rate: attempt(at, s, task.test)[1]
            )
            print(f"{label} r={r}, rate {rate:g}, seed {seed}: {_shown(seeds[seed])}", flush=True)
        summary = {
            "r": r,
            "parameters": chosen["parameters"],
            "rate": rate,
            "validation": {str(k): v for k, v in tried.items()},
        }
        earlier = (records.done(f"{name}/{label}") or summary).get("test", {})
        records.put(f"{name}/{label}", summary | {"test": earlier | {str(k): v for k, v in seeds.items()}})


def _shown(found: Losses | None) -> str:
    return f"{mean(found):.4f}" if found else "broke"


def report(name: str, records: Records, setting: Mapping[str, Any], layers: int) -> tuple[dict[str, Any], str]:
    """Finished candidates as numbers and as a table."""
    done = {label: record for label in candidates(layers) if (record := records.done(f"{name}/{label}"))}
    references = [label for label in ("activation", "principal") if label in done]
    seeds = {
        label: {int(seed): rows for seed, rows in record["test"].items() if rows} for label, record in done.items()
    }
    lines, numbers = [], {}
    for label, record in done.items():
        means = [mean(rows) for rows in seeds[label].values()]
        against = {other: paired_difference(seeds[label], seeds[other]) for other in references if other != label}
        tried = sorted(map(float, record["validation"]))
        edge = record["rate"] in (tried[0], tried[-1])
        wins = [off < -TIE and high < 0 for off, _, high, _ in against.values()]
        losses_ = [off > TIE and low > 0 for off, low, _, _ in against.values()]
        verdict = "" if label in references else "helps" if all(wins) else "behind both" if all(losses_) else "no"
        numbers[label] = {
            "r": record["r"],
            "parameters": record["parameters"],
            "rate": record["rate"],
            "rates": tried,
            "loss": float(np.mean(means)),
            "deviation": float(np.std(means, ddof=1)) if len(means) > 1 else None,
            "seeds": len(means),
            "against": {other: {"difference": d, "low": lo, "high": hi} for other, (d, lo, hi, _) in against.items()},
            "verdict": verdict,
        }
        spread = f" ± {np.std(means, ddof=1):.4f}" if len(means) > 1 else ""
        shown = {o: f"{d:+.4f} ({lo:+.4f} to {hi:+.4f})" for o, (d, lo, hi, _) in against.items()}
        lines.append(
            [
                label,
                str(record["r"]),
                f"{record['parameters']:,}",
                f"{record['rate']:g}{' (edge)' if edge else ''}",
                f"{np.mean(means):.4f}{spread}",
                *(shown.get(other, "") for other in ("activation", "principal")),
                str(len(means)),
                verdict,
            ]
        )
    header = ["candidate", "r", "parameters", "rate", "test loss"]
    header += ["against activation", "against principal", "seeds", "helps"]
    return numbers, harness.table(header, lines) if lines else "No candidate is finished yet."


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left of a setting, and write its table."""
    parser = setting_parser(__doc__, "folder with train.json and AddSub.json")
    parser.add_argument("--only", metavar="LABELS", help='rows, separated by ";"')
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="in place of the setting's; the first one chooses the rates"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    given = parser.parse_args(argv)
    setting = SETTINGS[given.setting] | ({"seeds": given.seeds} if given.seeds else {})
    task, records = begin(parser, given, setting, "candidates")
    layers = int(task.model.config.num_hidden_layers)
    only = given.only.split(";") if given.only else None
    if unknown := set(only or ()) - set(candidates(layers)):
        parser.error(f"--only: no rows {'; '.join(unknown)}; rows: {'; '.join(candidates(layers))}")
    if not given.report:
        run(given.setting, task, setting, records, only)
    numbers, shown = report(given.setting, records, setting, layers)
    problems = {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)}
    about = {"steps": task.steps, "batch": task.batch, "problems": problems}
    base = mean(records.get(f"{given.setting}/base", lambda: losses(task.model, task.test)))
    result = {**about, "base_loss": base, "candidates": numbers}
    text = (
        f"{task.steps} steps of {task.batch}, {len(task.test)} test problems, seeds 0, 1, ... "
        f"The model without training has a loss of {base:.4f}.\n\n{shown}"
    )
    print(text)
    harness.save(f"candidates_{given.setting}", result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
