"""Filters on poisoned training sets: each outcome as a record, and the tables of docs/defenses.

A set is CIFAR-10 with the poisons of one of the bank's victims; the filter is given the set and, if it asks for one,
that victim. To run, as often as need be (about a minute a filter and set on one core):
python -m benchmarks.filters --data-root DIR --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.bank import RESULTS, Banked, bank, has_trigger, poisoned_set
from benchmarks.detectors import evidence
from blto.data import load
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, DatasetFilter, Scores, score_dataset
from blto.files import append_jsonl, canonical_json, read_jsonl, sha256_file
from blto.models.checkpoints import load_encoder
from blto.poisoning import PoisonedDataset
from blto.runtime.progress import SILENT

FILE = "filters.jsonl"


class Tried(NamedTuple):
    """A filter with its options, and the bank's attacks whose sets it is tried on."""

    spec: Mapping[str, Any]
    groups: Sequence[str]


FILTERS: Mapping[str, Tried] = {
    "carried trigger": Tried({"name": "carried_trigger"}, ("blto", "blto_fresh", "blto_concealed", "patch")),
    "spectral signatures": Tried({"name": "spectral"}, ("patch",)),
    "activation clustering": Tried({"name": "activation_clustering"}, ("patch",)),
    "PatchSearch, 15 pixels": Tried({"name": "patch_search", "window": 15}, ("patch",)),
    "repeated windows": Tried({"name": "repeated_windows"}, ("patch",)),
    "frequency screening": Tried({"name": "frequency_screening"}, ("patch",)),
}
SEEDS = (*range(10), 50, 51)
METRICS = ("auroc", "auroc_within", "average_precision", "precision_at_count")
TITLES = ("AUROC", "within the class", "Average precision", "Precision at the poison count", "Seconds")


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


def ranking(spec: Mapping[str, Any], banked: Banked, poisoned: PoisonedDataset) -> Scores:
    """What a filter says of a victim's training set."""
    filtering = DEFENSES.build(spec)
    assert isinstance(filtering, DatasetFilter)
    return score_dataset(filtering, poisoned.training_images(), load_encoder(banked.file), Conditions(progress=SILENT))


def measure(results: Path, seeds: Sequence[int], train: ImageSet) -> None:
    """Score what has not been scored yet, and whose trigger is there."""
    assert train.labels is not None
    file = results / FILE
    rows = read_jsonl(file) if file.exists() else []
    done = {(canonical_json(DEFENSES.resolve(row["spec"])), row["encoder_sha256"]) for row in rows}
    for banked in bank(results):
        if banked.seed not in seeds or not has_trigger(banked):
            continue
        digest, poisoned = sha256_file(banked.file), None
        for name, tried in FILTERS.items():
            spec = DEFENSES.resolve(tried.spec)
            if banked.group not in tried.groups or (canonical_json(spec), digest) in done:
                continue
            poisoned = poisoned or poisoned_set(banked, train)
            started = time.monotonic()
            scores = ranking(spec, banked, poisoned)
            row = {"filter": name, "spec": spec, "group": banked.group, "seed": banked.seed, "encoder_sha256": digest}
            found = judge(scores, poisoned.plan.indices, train.labels == poisoned.plan.target_class)
            append_jsonl(file, {**row, **found, "seconds": time.monotonic() - started})
            sys.stdout.write(f"{name}: {banked.group} {banked.seed}: {found['average_precision']:.3f}\n")
            sys.stdout.flush()


def carried_trigger_table(results: Path) -> str:
    """A row for each of BLTO's sets, from the records."""
    lines = [f"| {' | '.join(('Seed', *TITLES))} |", f"| ---: |{' ---: |' * len(TITLES)}"]
    rows = [row for row in read_jsonl(results / FILE) if (row["filter"], row["group"]) == ("carried trigger", "blto")]
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        lines.append(f"| {row['seed']} | {' | '.join(values([row]))} |")
    return "\n".join(lines)


def filter_table(results: Path) -> str:
    """A row for each verified filter and attack: means over sets."""
    rows = [row for row in read_jsonl(results / FILE) if evidence(row["spec"]["name"]).status == "verified"]
    lines = [
        f"| {' | '.join(('Attack', 'Filter', 'Sets', *TITLES))} |",
        f"| --- | --- | {'---: | ' * len(TITLES)}---: |",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        for name in FILTERS:
            chosen = [row for row in rows if (row["group"], row["filter"]) == (group, name)]
            if chosen:
                lines.append(f"| {group} | {name} | {len(chosen)} | {' | '.join(values(chosen))} |")
    return "\n".join([*lines, "", "Means over sets, in brackets the lowest and the highest."])


def values(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table's columns from METRICS on, of one set or as means with the range over some."""
    shown = []
    for key in METRICS:
        found = [row[key] for row in rows]
        mean = f"{sum(found) / len(found):.3f}"
        shown.append(mean if len(found) == 1 else f"{mean} ({min(found):.3f}-{max(found):.3f})")
    return [*shown, format(sum(row["seconds"] for row in rows) / len(rows), ".0f")]


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("BLTO_DATA"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    measure(given.results, given.seeds, load("cifar10", data_root=given.data_root, split="train"))
    sys.stdout.write(filter_table(given.results) + "\n")


if __name__ == "__main__":
    main()
