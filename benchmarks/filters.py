"""Filters on training sets that BLTO has poisoned: each outcome as a record, and the table of docs/defenses/README.md.

A set is CIFAR-10 with the poisons of one of the bank's BLTO victims; the filter is given the set and that victim. To
run, as often as need be (about 70 seconds a set on one core): python -m benchmarks.filters --data-root DIR

The triggers are those of the store that the bank was made in (configs/sweeps/bank_poisoned.yaml).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.detectors import RESULTS, bank
from benchmarks.repairs import STORE, trigger_of
from blto.data import load
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, DatasetFilter, score_dataset
from blto.files import append_jsonl, canonical_json, read_jsonl, sha256_file
from blto.models.checkpoints import load_encoder
from blto.poisoning import apply_to_uint8, plan_replacement
from blto.records import load_record
from blto.runtime.progress import SILENT

FILE = "filters.jsonl"
FILTERS: Mapping[str, Mapping[str, Any]] = {"carried trigger": {"name": "carried_trigger"}}
GROUP = "blto"
SEEDS = tuple(range(10))
TITLES = (
    "Filter",
    "Seed",
    "AUROC",
    "within the class",
    "Average precision",
    "Precision at the poison count",
    "Seconds",
)


def judge(
    scores: npt.NDArray[np.float64], poisons: npt.NDArray[np.int64], own: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """What a ranking is worth; `own` are the images of the target class, poisons among them."""
    is_poison = np.zeros(len(scores), bool)
    is_poison[poisons] = True
    highest = np.argsort(-scores, kind="stable")[: len(poisons)]
    return {
        "auroc": float(roc_auc_score(is_poison, scores)),
        "auroc_within": float(roc_auc_score(is_poison[own], scores[own])),
        "average_precision": float(average_precision_score(is_poison, scores)),
        "precision_at_count": float(is_poison[highest].mean()),
        "prevalence": float(is_poison.mean()),
    }


def measure(results: Path, store: Path, seeds: Sequence[int], train: ImageSet) -> None:
    """Score what has not been scored yet."""
    assert train.labels is not None
    file = results / FILE
    rows = read_jsonl(file) if file.exists() else []
    done = {(canonical_json(DEFENSES.resolve(row["spec"])), row["encoder_sha256"]) for row in rows}
    for name, options in FILTERS.items():
        spec, filtering = DEFENSES.resolve(options), DEFENSES.build(options)
        assert isinstance(filtering, DatasetFilter)
        for banked in bank(results):
            digest = sha256_file(banked.file)
            if banked.group != GROUP or banked.seed not in seeds or (canonical_json(spec), digest) in done:
                continue
            attack = load_record(banked.file.parent / "record.json").spec["attack"]
            plan = plan_replacement(
                train.labels,
                num_classes=train.num_classes,
                target_class=attack["target_class"],
                poison_rate=attack["poison_rate"],
                seed=banked.seed,
            )
            poisons = apply_to_uint8(trigger_of(banked, store), train.images[plan.indices])
            suspects, started = train.replace(plan.indices, poisons), time.monotonic()
            scores = score_dataset(filtering, suspects, load_encoder(banked.file), Conditions(progress=SILENT))
            row = {"filter": name, "spec": spec, "group": banked.group, "seed": banked.seed, "encoder_sha256": digest}
            found = judge(scores, plan.indices, train.labels == attack["target_class"])
            append_jsonl(file, {**row, **found, "seconds": time.monotonic() - started})
            sys.stdout.write(f"{name}: {banked.group} {banked.seed}: {found['average_precision']:.3f}\n")
            sys.stdout.flush()


def filter_table(results: Path) -> str:
    """A row for each set, from the records."""
    lines = [f"| {' | '.join(TITLES)} |", f"| --- |{' ---: |' * (len(TITLES) - 1)}"]
    for row in sorted(read_jsonl(results / FILE), key=lambda row: (row["filter"], row["seed"])):
        values = [f"{row[key]:.3f}" for key in ("auroc", "auroc_within", "average_precision", "precision_at_count")]
        lines.append(f"| {' | '.join([row['filter'], str(row['seed']), *values, format(row['seconds'], '.0f')])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("BLTO_DATA"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    measure(given.results, given.store, given.seeds, load("cifar10", data_root=given.data_root, split="train"))
    sys.stdout.write(filter_table(given.results) + "\n")


if __name__ == "__main__":
    main()
