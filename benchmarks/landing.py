"""Where do triggered images go? Each backdoored encoder of the bank as a record, and the table of docs/findings.md.

An ASR counts the images that go to the target class. Of those that go elsewhere it does not say whether they scatter,
as without a backdoor, or all go to one other class. Probes are fitted on all training images, as a run's own are. To
run (a minute an encoder on one core):
python -m benchmarks.landing --data-root DIR --seeds 0 1 50
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bank import Bench, arguments, attacked, cifar10, recorded, table_of, twin_of, victim
from blto.data.images import ImageSet
from blto.evaluation import PROBES, extract, fit_probe
from blto.files import append_jsonl, sha256_file
from blto.models.checkpoints import load_encoder
from blto.models.encoder import Encoder

FILE = "landing.jsonl"
SEEDS = (0, 1, 2, 3, 4, 50)
ENDS = tuple(f"{of} ({probe})" for probe in PROBES for of in ("Most go to", "On the clean twin"))


def shares(encoder: Encoder, triggered: ImageSet, bench: Bench, target: int) -> dict[str, list[float]]:
    """Probe -> of the triggered images of other classes, the share that it takes for each class."""
    assert triggered.labels is not None
    others, classes = triggered.labels != target, triggered.num_classes
    known = extract(encoder, bench.probe.images, bench.probe.labels)
    seen = extract(encoder, triggered.images[others]).vectors
    found = {probe: fit_probe(probe, known, classes)(seen) for probe in PROBES}
    return {probe: (np.bincount(labels, minlength=classes) / others.sum()).tolist() for probe, labels in found.items()}


def measure(results: Path, seeds: Sequence[int], train: ImageSet, test: ImageSet) -> None:
    """Judge what has not been, and whose trigger is there."""
    bench, file = Bench(train, test), results / FILE
    done = {row["encoder_sha256"] for row in recorded(file)}
    for banked in attacked(results, seeds):
        digest = sha256_file(banked.file)
        if digest in done:
            continue
        of = victim(banked, digest, bench).triggered
        triggered = ImageSet(of.images, test.labels, test.class_names, test.name)
        row = {"group": banked.group, "seed": banked.seed, "encoder_sha256": digest}
        row |= {"target": test.class_names[of.target_class], "classes": list(test.class_names)}
        for name, encoder in (("victim", load_encoder(banked.file)), ("clean_twin", twin_of(banked))):
            row[name] = shares(encoder, triggered, bench, of.target_class)
        append_jsonl(file, row)
        sys.stdout.write(f"{banked.group} {banked.seed}: {most(row, 'victim', 'linear')}\n")
        sys.stdout.flush()


def most(row: Mapping[str, Any], encoder: str, probe: str) -> str:
    """The class to which most images go, and their share; also the target's, where that is another."""
    found, classes = row[encoder][probe], row["classes"]
    best, target = int(np.argmax(found)), classes.index(row["target"])
    other = "" if best == target else f", target {found[target]:.0%}"
    return f"{classes[best]} {found[best]:.0%}{other}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row an encoder."""
    lines = [f"| {' | '.join(('Attack', 'Seed', 'Target', *ENDS))} |", f"| --- | ---: | --- |{' --- |' * len(ENDS)}"]
    for row in sorted(rows, key=lambda row: (row["group"], int(row["seed"]))):
        ends = [most(row, encoder, probe) for probe in PROBES for encoder in ("victim", "clean_twin")]
        lines.append(f"| {' | '.join([row['group'], str(row['seed']), row['target'], *ends])} |")
    return "\n".join(lines)


def landing_table(results: Path) -> str:
    """The table of what has been measured."""
    return table_of(results / FILE, table)


def main() -> None:
    """Measure what is missing, and print the table."""
    given = arguments(__doc__, SEEDS).parse_args()
    measure(given.results, given.seeds, *cifar10(given.data_root))
    sys.stdout.write(landing_table(given.results) + "\n")


if __name__ == "__main__":
    main()
