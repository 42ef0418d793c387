"""What filtering is worth: victims trained again on what a filter leaves, each outcome as a record, and their table.

A filter ranks the training set of one of the bank's victims, the highest share is removed, and a victim is trained on
the rest by the same recipe from the same seed. It is judged beside the same clean twin. To run, as often as need be
(ten minutes a victim on one core; one that was stopped goes on):
python -m benchmarks.retraining --data-root DIR --seeds 0 1
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bank import (
    COLUMNS,
    Bench,
    arguments,
    attacked,
    cifar10,
    columns,
    judge,
    poisoned_set,
    recorded,
    table_of,
    twin_of,
    victim,
)
from benchmarks.filters import FILTERS, ranking
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.experiment import Environment, ExperimentSpec
from blto.experiment.outcome import ENCODER
from blto.experiment.stages import pretrain_stage
from blto.files import append_jsonl, canonical_json, sha256_file
from blto.models.checkpoints import load_encoder
from blto.records import RunStore
from blto.runtime.seeds import numpy_generator

FILE = "retraining.jsonl"
STORE = Path("runs/retraining")
RANDOM = "at random"
FILTERED: Mapping[str, Sequence[str]] = {
    "patch": ("spectral signatures", "repeated windows", RANDOM),
    "patch_truck": ("spectral signatures", "repeated windows", RANDOM),
    "blto": ("carried trigger", RANDOM),
    "blto_fresh": ("carried trigger", RANDOM),
    "blto_concealed": ("carried trigger",),
}
"""Attack -> the best filters on its sets, and none, which removes as many images."""
EXCESS = 1.5
"""Images removed for each poison (Tran et al., NeurIPS 2018)."""
SEEDS = (0, 1, 2, 50, 51)
TITLES = ("Attack", "Filter", "Removed", "Victims", "Poisons left", *COLUMNS)


def measure(results: Path, store: Path, seeds: Sequence[int], train: ImageSet, test: ImageSet) -> None:
    """Filter, train again and judge what has not been, and whose trigger is there."""
    bench, file = Bench.of(train, test), results / FILE
    rows = recorded(file)
    done = {
        (canonical_json(DEFENSES.resolve(row["spec"]) if row["spec"] else {}), row["encoder_sha256"]) for row in rows
    }
    environment = Environment(RunStore(store), device="cpu", resume=True)
    for banked in attacked(results, seeds):
        digest, names = sha256_file(banked.file), FILTERED.get(banked.group, ())
        specs = {name: {} if name == RANDOM else DEFENSES.resolve(FILTERS[name]) for name in names}
        left = {name: spec for name, spec in specs.items() if (canonical_json(spec), digest) not in done}
        if not left:
            continue
        poisoned, encoder = poisoned_set(banked, train), load_encoder(banked.file)
        suspects, twin = poisoned.training_images(), twin_of(banked)
        triggered = victim(banked, digest, bench).triggered
        removed, before = EXCESS * banked.attack.poison_rate, judge(encoder, twin, triggered, bench)
        for name, spec in left.items():
            chance = numpy_generator(banked.seed, "select", "removed").random(len(train))
            scores = ranking(spec, encoder, suspects) if spec else chance
            kept = np.sort(np.argsort(-scores, kind="stable")[round(removed * len(train)) :])
            recipe = ExperimentSpec.parse(dict(banked.record.spec))
            stage = pretrain_stage(recipe, suspects.subset(kept), environment)
            after = judge(load_encoder(stage.path / ENCODER), twin, triggered, bench)
            row = {"filter": name, "spec": spec, "removed": removed, "group": banked.group, "seed": banked.seed}
            row |= {"encoder_sha256": digest, "poisons_left": float(poisoned.mask[kept].sum() / poisoned.n_poisoned)}
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
    return table_of(results / FILE, table)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--store", type=Path, default=STORE)
    given = parser.parse_args()
    measure(given.results, given.store, given.seeds, *cifar10(given.data_root))
    sys.stdout.write(retraining_table(given.results) + "\n")


if __name__ == "__main__":
    main()
