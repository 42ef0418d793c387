"""Filters on poisoned training sets: each outcome as a record, and the tables of docs/defenses.

A set is CIFAR-10 with the poisons of one of the bank's victims; the filter is given the set and, if it asks for one,
that victim. To run, as often as need be (about a minute a filter and set on one core):
python -m benchmarks.filters --data-root DIR --seeds 0 1 2
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.bank import PARTS, arguments, attacked, cifar10, poisoned_set, recorded
from benchmarks.detectors import evidence
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, DatasetFilter, Scores, score_dataset
from blto.files import append_jsonl, canonical_json, sha256_file
from blto.models.checkpoints import load_encoder
from blto.models.encoder import Encoder
from blto.runtime.progress import SILENT

FILE = "filters.jsonl"
SETS = (*PARTS, "cifar10-cpu")
"""Also those of an earlier recipe, with a generator of another kind, and of a generator that nothing has trained."""
FILTERS: Mapping[str, Mapping[str, Any]] = {
    "carried trigger": {"name": "carried_trigger"},
    "spectral signatures": {"name": "spectral"},
    "activation clustering": {"name": "activation_clustering"},
    "PatchSearch, 15 pixels": {"name": "patch_search", "window": 15},
    "repeated windows": {"name": "repeated_windows"},
    "frequency screening": {"name": "frequency_screening"},
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


def ranking(spec: Mapping[str, Any], encoder: Encoder, suspects: ImageSet) -> Scores:
    """What a filter says of a victim's training set."""
    filtering = DEFENSES.build(spec)
    assert isinstance(filtering, DatasetFilter)
    return score_dataset(filtering, suspects, encoder, Conditions(progress=SILENT))


def measure(results: Path, seeds: Sequence[int], train: ImageSet) -> None:
    """Score what has not been scored yet: the sets of attacks that poison, and whose trigger is there."""
    assert train.labels is not None
    file = results / FILE
    done = {(canonical_json(DEFENSES.resolve(row["spec"])), row["encoder_sha256"]) for row in recorded(file)}
    for banked in attacked(results, seeds, SETS):
        digest = sha256_file(banked.file)
        specs = {name: DEFENSES.resolve(options) for name, options in FILTERS.items()}
        left = {name: spec for name, spec in specs.items() if (canonical_json(spec), digest) not in done}
        if not left or banked.attack.poison_rate == 0:
            continue
        poisoned, encoder = poisoned_set(banked, train), load_encoder(banked.file)
        suspects, own = poisoned.training_images(), train.labels == poisoned.plan.target_class
        for name, spec in left.items():
            started = time.monotonic()
            scores = ranking(spec, encoder, suspects)
            row = {"filter": name, "spec": spec, "group": banked.group, "seed": banked.seed, "encoder_sha256": digest}
            row["seconds"] = time.monotonic() - started
            found = judge(scores, poisoned.plan.indices, own)
            append_jsonl(file, {**row, **found})
            sys.stdout.write(f"{name}: {banked.group} {banked.seed}: {found['average_precision']:.3f}\n")
            sys.stdout.flush()


def carried_trigger_table(results: Path) -> str:
    """A row for each set that the carried trigger has ranked, from the records."""
    lines = [f"| {' | '.join(('Attack', 'Seed', *TITLES))} |", f"| --- | ---: |{' ---: |' * len(TITLES)}"]
    rows = [row for row in recorded(results / FILE) if row["filter"] == "carried trigger"]
    for row in sorted(rows, key=lambda row: (row["group"], int(row["seed"]))):
        lines.append(f"| {row['group']} | {row['seed']} | {' | '.join(values([row]))} |")
    return "\n".join(lines)


def filter_table(results: Path) -> str:
    """A row for each verified filter and attack: means over sets."""
    rows = [row for row in recorded(results / FILE) if evidence(row["spec"]["name"]).status == "verified"]
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
    given = arguments(__doc__, SEEDS).parse_args()
    measure(given.results, given.seeds, cifar10(given.data_root)[0])
    sys.stdout.write(filter_table(given.results) + "\n")


if __name__ == "__main__":
    main()
