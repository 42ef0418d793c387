"""What filtering is worth: victims trained again on what a filter leaves, each outcome as a record, and their table.

A filter ranks the training set of one of the bank's victims, the highest share is removed, and a victim is trained on
the rest by the same recipe from the same seed. It is judged beside the same clean twin. To run, as often as need be
(ten minutes a victim on one core; one that was stopped goes on):
python -m benchmarks.retraining --data-root DIR --seeds 0 1
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bank import COLUMNS, RESULTS, Bench, bank, columns, has_trigger, judge, poisoned_set, twin_of, victim
from benchmarks.filters import FILTERS, ranking
from blto.data import load
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.experiment import Environment, ExperimentSpec
from blto.experiment.outcome import ENCODER
from blto.experiment.stages import pretrain_stage
from blto.files import append_jsonl, canonical_json, read_jsonl, sha256_file
from blto.models.checkpoints import load_encoder
from blto.records import RunStore

FILE = "retraining.jsonl"
STORE = Path("runs/retraining")
FILTERED: Mapping[str, Sequence[str]] = {
    "patch": ("spectral signatures", "repeated windows"),
    "blto": ("carried trigger",),
    "blto_fresh": ("carried trigger",),
}
"""Attack -> the best filters on its sets."""
REMOVED = {"patch": 0.15, "blto": 0.015, "blto_fresh": 0.015}
"""Share of the training set that is removed: one and a half times the poisons' (Tran et al., NeurIPS 2018)."""
SEEDS = (0, 1, 2, 50, 51)
TITLES = ("Attack", "Filter", "Removed", "Victims", "Poisons left", *COLUMNS)


def measure(results: Path, store: Path, seeds: Sequence[int], train: ImageSet, test: ImageSet) -> None:
    """Filter, train again and judge what has not been, and whose trigger is there."""
    bench, file = Bench.of(train, test), results / FILE
    rows = read_jsonl(file) if file.exists() else []
    done = {(canonical_json(DEFENSES.resolve(row["spec"])), row["removed"], row["encoder_sha256"]) for row in rows}
    environment = Environment(RunStore(store), device="cpu", resume=True)
    for banked in bank(results):
        if banked.seed not in seeds or not has_trigger(banked):
            continue
        digest = sha256_file(banked.file)
        for name in FILTERED.get(banked.group, ()):
            spec, removed = DEFENSES.resolve(FILTERS[name].spec), REMOVED[banked.group]
            if (canonical_json(spec), removed, digest) in done:
                continue
            poisoned = poisoned_set(banked, train)
            order = np.argsort(-ranking(spec, banked, poisoned), kind="stable")
            kept = np.sort(order[round(removed * len(train)) :])
            recipe = ExperimentSpec.parse(dict(banked.record.spec))
            stage = pretrain_stage(recipe, poisoned.training_images().subset(kept), environment)
            twin, of = twin_of(banked), victim(banked, digest, bench)
            row = {"filter": name, "spec": spec, "removed": removed, "group": banked.group, "seed": banked.seed}
            row |= {"encoder_sha256": digest, "poisons_left": float(poisoned.mask[kept].sum() / poisoned.n_poisoned)}
            before, after = (judge(load_encoder(each), twin, of, bench) for each in (banked.file, stage.path / ENCODER))
            append_jsonl(file, {**row, "before": before, "after": after})
            sys.stdout.write(f"{name}: {banked.group} {banked.seed}: ASR {after['linear']['asr']:.3f}\n")
            sys.stdout.flush()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each attack its victims as they were, and a row for each filter; means over seeds."""
    lines = [f"| {' | '.join(TITLES)} |", f"| --- | --- |{' ---: |' * (len(TITLES) - 2)}"]
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        untouched = {row["encoder_sha256"]: row["before"] for row in of_group}
        first = [group, "none", "", str(len(untouched)), "100%"]
        lines.append(f"| {' | '.join([*first, *columns(list(untouched.values()))])} |")
        for name in dict.fromkeys(row["filter"] for row in of_group):
            chosen = [row for row in of_group if row["filter"] == name]
            left = sum(row["poisons_left"] for row in chosen) / len(chosen)
            first = [group, name, f"{chosen[0]['removed']:.1%}", str(len(chosen)), f"{left:.1%}"]
            lines.append(f"| {' | '.join([*first, *columns([row['after'] for row in chosen])])} |")
    return "\n".join([*lines, "", "Means over seeds; lifts with Student's 95% interval over them."])


def retraining_table(results: Path) -> str:
    """The table of what has been measured."""
    file = results / FILE
    return table(read_jsonl(file)) if file.exists() else "Not measured yet: `python -m benchmarks.retraining`."


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("BLTO_DATA"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    train, test = (load("cifar10", data_root=given.data_root, split=split) for split in ("train", "test"))
    measure(given.results, given.store, given.seeds, train, test)
    sys.stdout.write(retraining_table(given.results) + "\n")


if __name__ == "__main__":
    main()
