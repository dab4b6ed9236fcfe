"""What a model forgets of general text while it learns a task: held-out loss before and after, at each method's own rate.

    python -m benchmarks.forgetting --setting embedded --work /tmp/forgetting
    python -m benchmarks.forgetting --setting smollm2 --model smollm2-135m --data ../shared/data --work /tmp/forgetting

The same command goes on where another one was stopped. Each method's rate is the one with the lowest loss on validation
problems of the task, from a grid that goes on where the best lies at its edge; nothing is chosen by the general text. The
general text is held out from every training here: of the embedded model texts of the kind that it was pre-trained on, with
another seed; of SmolLM2 the calibration text inside the package, and sentences of film reviews (SST-2).

Forgetting is the loss after training minus the loss before, on the same texts, in nats a token. Intervals are a bootstrap
over seeds and, within each, texts. A method forgets less than another if the interval of their difference leaves out zero.

A larger rate learns and forgets more, so the method with the larger best rate looks the worse in that table. The second
table has every rate with one seed: there methods can be held against each other where they have learnt about as much.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tools.tiny_corpus import corpus

from benchmarks import harness
from benchmarks.candidates import TARGETS
from benchmarks.short_runs import (
    TRAININGS,
    Losses,
    Records,
    Row,
    Task,
    begin,
    best_rate,
    losses,
    mean,
    paired_difference,
    setting_parser,
    train,
)
from pica.calibration.texts import embedded_text
from pica.experiments.adapters import attach
from pica.experiments.recipes.recipe import AdapterSection

SEEDS = (0, 1, 2)
TEXTS = 200
LONGEST = 192  # tokens of a text
UNSEEN = 20_261  # of texts of the embedded model's kind; it was pre-trained with another seed

SETTINGS: dict[str, dict[str, Any]] = {
    "embedded": {
        **TRAININGS["embedded"],
        "methods": {
            "PiCa r=13": ({"method": "pica", "r": 13}, [3e-3, 1e-2, 3e-2]),
            "LoRA r=1": ({"method": "lora", "r": 1}, [1e-2, 3e-2, 1e-1]),
            "LoRA r=8": ({"method": "lora", "r": 8}, [3e-3, 1e-2, 3e-2]),
            "full": ({"method": "full"}, [3e-4, 1e-3, 3e-3]),
        },
    },
    "smollm2": {
        **TRAININGS["smollm2"],
        "methods": {
            "PiCa r=67": ({"method": "pica", "r": 67}, [1e-3, 3e-3, 1e-2]),
            "LoRA r=1": ({"method": "lora", "r": 1}, [3e-3, 1e-2, 3e-2]),
            "LoRA r=8": ({"method": "lora", "r": 8}, [1e-3, 3e-3, 1e-2]),
            "full": ({"method": "full"}, [3e-5, 1e-4, 3e-4]),
        },
    },
}


def general_texts(setting: str, data: Path | None) -> dict[str, list[str]]:
    """Held-out texts by what they are."""
    if data is None:
        return {"pre-training text": list(corpus(UNSEEN, TEXTS))}
    lines = (data / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    sentences = [line.split("\t")[0].strip() for line in lines]
    chosen = np.random.default_rng(0).permutation(len(sentences))[:TEXTS]
    prose = [part.strip() for part in embedded_text().split("\n\n") if part.strip()]
    return {"prose": prose, "film reviews": [sentences[i] for i in chosen]}


def encoded(texts: Sequence[str], tokenizer: Any) -> list[Row]:
    """Texts as rows whose every token but the first is asked for."""
    rows = [ids[:LONGEST] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    return [{"input_ids": ids, "labels": ids} for ids in rows if len(ids) > 1]


def run(
    name: str, task: Task, methods: Mapping[str, Any], texts: Mapping[str, Sequence[Row]], records: Records
) -> None:
    """Train and measure what is not done yet."""

    def measured(model: Any) -> dict[str, Losses]:
        return {"task": losses(model, task.test)} | {kind: losses(model, rows) for kind, rows in texts.items()}

    records.get(f"{name}/before", lambda: measured(task.model))
    for label, (fields, rates) in methods.items():
        section = AdapterSection(**fields, target_modules=list(TARGETS))

        def trained(rate: float, seed: int, section: AdapterSection = section) -> tuple[Any, int]:
            model = attach(task.fresh(), section, seed=seed)
            weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
            fine = train(model, weights, task, rate=rate, seed=seed)
            return (model if fine else None), sum(weight.numel() for weight in weights)

        def validated(rate: float, label: str = label, trained: Any = trained) -> float:
            def make() -> dict[str, Any]:
                model, parameters = trained(rate, SEEDS[0])
                if model is None:
                    return {"parameters": parameters, "validation": None}
                return {
                    "parameters": parameters,
                    "validation": losses(model, task.validation),
                    "after": measured(model),
                }

            found = records.get(f"{name}/{label}/rate {rate:g}", make)
            loss = mean(found["validation"]) if found["validation"] else float("inf")
            print(f"{label}, rate {rate:g}: {loss:.4f}", flush=True)
            return loss

        rate, tried = best_rate(rates, validated)
        chosen = records.done(f"{name}/{label}/rate {rate:g}")
        after = {str(SEEDS[0]): chosen["after"]}
        for seed in SEEDS[1:]:

            def again(seed: int = seed, rate: float = rate, trained: Any = trained) -> Any:
                model, _ = trained(rate, seed)
                return None if model is None else measured(model)

            after[str(seed)] = records.get(f"{name}/{label}/seed {seed}", again)
            print(f"{label}, rate {rate:g}, seed {seed}", flush=True)
        summary = {"rate": rate, "rates": sorted(tried), "parameters": chosen["parameters"], "after": after}
        records.get(f"{name}/{label}", lambda found=summary: found)


def report(name: str, methods: Mapping[str, Any], records: Records) -> tuple[dict[str, Any], str]:
    """Finished methods as numbers and as a table."""
    before = records.done(f"{name}/before")
    if before is None:
        return {}, "Nothing is finished yet."
    kinds = [kind for kind in before if kind != "task"]
    done = {label: record for label in methods if (record := records.done(f"{name}/{label}"))}
    first = next(iter(done), None)

    def by_seed(label: str, kind: str) -> dict[int, Losses]:
        return {int(seed): found[kind] for seed, found in done[label]["after"].items() if found}

    numbers: dict[str, Any] = {"before": {kind: mean(found) for kind, found in before.items()}, "methods": {}}
    lines = [["before", "", "", f"{mean(before['task']):.4f}", *(f"{mean(before[kind]):.4f}" for kind in kinds), ""]]
    for label, record in done.items():
        task = [mean(found) for found in by_seed(label, "task").values()]
        forgot, shown = {}, []
        for kind in kinds:
            after = by_seed(label, kind)
            off, low, high, seeds = paired_difference(after, dict.fromkeys(after, before[kind]))
            against = paired_difference(after, by_seed(first, kind)) if first and label != first else None
            forgot[kind] = {"forgetting": off, "low": low, "high": high, "seeds": seeds, "against_first": against}
            shown.append(f"{off:+.4f} ({low:+.4f} to {high:+.4f})")
        edge = record["rate"] in (record["rates"][0], record["rates"][-1])
        numbers["methods"][label] = {
            "parameters": record["parameters"],
            "rate": record["rate"],
            "edge": edge,
            "task_loss": float(np.mean(task)),
            "task_deviation": float(np.std(task, ddof=1)) if len(task) > 1 else None,
            "general": forgot,
        }
        spread = f" ± {np.std(task, ddof=1):.4f}" if len(task) > 1 else ""
        rate = f"{record['rate']:g}{' (edge)' if edge else ''}"
        lines.append([label, f"{record['parameters']:,}", rate, f"{np.mean(task):.4f}{spread}", *shown, str(len(task))])
    shown = harness.table(["method", "parameters", "rate", "task loss", *kinds, "seeds"], lines)
    rates = []
    for label, record in done.items():
        for rate in record["rates"]:
            found = records.done(f"{name}/{label}/rate {rate:g}")["after"]
            change = {kind: mean(found[kind]) - mean(before[kind]) for kind in kinds}
            numbers["methods"][label].setdefault("rates", {})[f"{rate:g}"] = {
                "task_loss": mean(found["task"]),
                **change,
            }
            rates.append([label, f"{rate:g}", f"{mean(found['task']):.4f}", *(f"{x:+.4f}" for x in change.values())])
    return numbers, f"{shown}\nEach rate, one seed.\n\n{harness.table(['method', 'rate', 'task loss', *kinds], rates)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left of a setting, and write its table."""
    parser = setting_parser(__doc__, "folder with arithmetic and sst2")
    given = parser.parse_args(argv)
    setting = SETTINGS[given.setting]
    task, records = begin(parser, given, setting, "forgetting", "arithmetic")
    texts = {kind: encoded(found, task.tokenizer) for kind, found in general_texts(given.setting, given.data).items()}
    run(given.setting, task, setting["methods"], texts, records)
    numbers, shown = report(given.setting, setting["methods"], records)
    counts = ", ".join(f"{len(rows)} texts of {kind}" for kind, rows in texts.items())
    text = f"{task.steps} steps of {task.batch}; {len(task.test)} test problems, {counts}.\n\n{shown}"
    print(text)
    harness.save(f"forgetting_{given.setting}", {"steps": task.steps, "batch": task.batch, **numbers}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
