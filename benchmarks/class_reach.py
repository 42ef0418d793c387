"""How easily is each class reached where nobody attacked? Each class as a record, and the table of docs/findings.md.

For each class a small generator within 8/255 learns, on three clean encoders of the bank in turn, to move images there
(BLTO's outer objective), and its ASR is taken on other clean encoders: what the class gives a trigger without any
poison. Beside it stands how much of the class one k-means cluster holds, by which a defender without labels would have
to find it. To run (a minute a class on one core): python -m benchmarks.class_reach --data-root DIR
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bank import CLEAN, Bench, Triggered, arguments, bank, cifar10, judge, recorded, table_of
from blto.data.images import ImageSet
from blto.defenses.base import Conditions
from blto.defenses.cluster_triggers import Search, common_clusters, invert_clusters, vectors_of
from blto.evaluation import PROBES
from blto.files import append_jsonl
from blto.models.checkpoints import load_encoder
from blto.models.encoder import Encoder
from blto.poisoning import apply_to_uint8
from blto.runtime.progress import SILENT

FILE = "class_reach.jsonl"
LEARNED_ON, JUDGED_ON = (20, 24, 28), (1, 3, 5)
"""Seeds of the clean encoders."""
SEARCH = Search(epsilon=8 / 255, width=32, steps=400, batch_size=64, lr=2e-3)
IMAGES = 5_000
CLUSTERS = 10
COLUMNS = (
    "Class",
    "ASR (linear)",
    "ASR (kNN)",
    "Untriggered",
    "Of the class, in one cluster",
    "Of that cluster, the class",
)


def measure(results: Path, train: ImageSet, test: ImageSet) -> None:
    """Learn a trigger for each class, and judge it; where that has been done, nothing."""
    if recorded(results / FILE):
        return
    clean = {each.seed: each for each in bank(results) if each.group == CLEAN}
    encoders = [load_encoder(clean[seed].file) for seed in LEARNED_ON]
    images, conditions = train.subset(np.arange(min(IMAGES, len(train)))), Conditions(progress=SILENT)
    bench = Bench.of(train, test)
    assert images.labels is not None
    labels = images.labels.astype(np.int64)
    features = [vectors_of(encoder, images.images, conditions) for encoder in encoders]
    clusters = common_clusters(features, CLUSTERS, conditions.seed)
    triggers = invert_clusters(encoders, features, images.images, labels, SEARCH, conditions)
    rows = []
    for target, (name, trigger) in enumerate(zip(train.class_names, triggers, strict=True)):
        triggered = Triggered(apply_to_uint8(trigger.at_test(), bench.test.images), target)
        found = [rates(load_encoder(clean[seed].file), triggered, bench) for seed in JUDGED_ON]
        of_class = np.bincount(clusters[labels == target], minlength=CLUSTERS)
        best = int(of_class.argmax())
        row = {"class": name, "found": found, "in_cluster": float(of_class[best] / of_class.sum())}
        rows.append({**row, "of_cluster": float(of_class[best] / (clusters == best).sum())})
        sys.stdout.write(f"{name}: {[each['linear']['asr'] for each in found]}\n")
        sys.stdout.flush()
    for row in rows:
        append_jsonl(results / FILE, row)


def rates(clean: Encoder, triggered: Triggered, bench: Bench) -> dict[str, dict[str, float | None]]:
    """Probe -> ASR and untriggered rate of an encoder that has no victim: it stands for its own twin."""
    found = judge(clean, clean, triggered, bench)
    return {probe: {name: found[probe][name] for name in ("asr", "untriggered_rate")} for probe in PROBES}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a class, the most easily reached first; means over encoders, with their range."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]

    def shown(row: Mapping[str, Any], probe: str, metric: str) -> str:
        values = [100 * found[probe][metric] for found in row["found"]]
        return f"{sum(values) / len(values):.1f}% ({min(values):.1f}-{max(values):.1f})"

    def order(row: Mapping[str, Any]) -> float:
        return -sum(float(found["linear"]["asr"]) for found in row["found"])

    for row in sorted(rows, key=order):
        cells = [shown(row, "linear", "asr"), shown(row, "knn", "asr"), shown(row, "linear", "untriggered_rate")]
        cells += [f"{row[key]:.0%}" for key in ("in_cluster", "of_cluster")]
        lines.append(f"| {' | '.join([row['class'], *cells])} |")
    return "\n".join(lines)


def class_reach_table(results: Path) -> str:
    """The table of what has been measured."""
    return table_of(results / FILE, table)


def main() -> None:
    """Measure, unless it has been done, and print the table."""
    given = arguments(__doc__).parse_args()
    measure(given.results, *cifar10(given.data_root))
    sys.stdout.write(class_reach_table(given.results) + "\n")


if __name__ == "__main__":
    main()
