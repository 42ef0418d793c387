"""Repairs on the bank of small encoders: each outcome as a record, and the table of docs/defenses/README.md.

A defender holds a share of the clean training images, without labels, and repairs a backdoored encoder; its clean twin
of the same seed is repaired in the same way, on the same images. Fewer images are passed over more often, so that every
share takes as many steps. To run, as often as need be (a minute or two an encoder, repair and share on one core):
python -m benchmarks.repairs --data-root DIR --seeds 0 1 2 [--attacks patch blto] [--repairs CLP fine-tuning]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bank import (
    CLEAN,
    COLUMNS,
    RESULTS,
    Bench,
    Found,
    arguments,
    attacked,
    bank,
    cifar10,
    columns,
    judge,
    recorded,
    table_of,
    twin_of,
    victim,
)
from benchmarks.detectors import evidence
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, EncoderRepair, repair_encoder
from blto.files import append_jsonl, canonical_json, sha256_file
from blto.models.checkpoints import load_encoder
from blto.runtime.progress import SILENT

FILE = "repairs.jsonl"
REPAIRS: Mapping[str, Mapping[str, Any]] = {
    "CLP": {"name": "clp"},
    "fine-tuning": {"name": "clean_fine_tuning"},
    "fine-pruning": {"name": "fine_pruning"},
    "distillation": {"name": "distillation"},
    "unlearning": {"name": "unlearning"},
}
SHARES = (0.01, 0.05, 0.1)
"""Of the training images; the options' defaults are for the last."""
SEEDS = (0, 1, 2, 3, 4, 50)
TITLES = ("Attack", "Repair", "Clean images", "Encoders", *COLUMNS, "CPU seconds")


def variants(repair: Mapping[str, Any], size: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """(Share, whole spec) of a repair for a training set of `size` images; share 0, once, of one that needs none."""
    spec = DEFENSES.resolve(repair)
    if "images" not in spec:
        yield 0.0, spec
        return
    for share in SHARES:
        more = {"epochs": round(spec["epochs"] * SHARES[-1] / share)} if "epochs" in spec else {}
        yield share, {**spec, "images": round(share * size), **more}


def measure(
    results: Path,
    seeds: Sequence[int],
    train: ImageSet,
    test: ImageSet,
    *,
    attacks: Sequence[str] = (),
    repairs: Sequence[str] = (),
) -> None:
    """Repair and judge what has not been, and whose trigger is there; of some attacks and repairs only, if named."""
    bench, clean, file = Bench.of(train, test), train.without_labels(), results / FILE
    rows = recorded(file)
    done = {(canonical_json(DEFENSES.resolve(row["spec"])), row["encoder_sha256"]) for row in rows}
    before = {row["encoder_sha256"]: row["before"] for row in rows}
    chosen = {name: REPAIRS[name] for name in repairs or REPAIRS}
    cells = [(name, *variant) for name, options in chosen.items() for variant in variants(options, len(train))]
    for seed in seeds:
        of_attacks = (each for each in attacked(results, [seed]) if not attacks or each.group in attacks)
        of_seed = [(banked, sha256_file(banked.file)) for banked in of_attacks]
        left = {digest for _, digest in of_seed for *_, spec in cells if (canonical_json(spec), digest) not in done}
        found = [victim(banked, digest, bench) for banked, digest in of_seed if digest in left]
        conditions = Conditions(seed, progress=SILENT)
        for name, share, spec in cells:
            wanted = [each for each in found if (canonical_json(spec), each.digest) not in done]
            if not wanted:
                continue
            repair, twin = DEFENSES.build(spec), twin_of(wanted[0].banked)  # which those of a seed share
            assert isinstance(repair, EncoderRepair)
            repaired_twin = repair_encoder(repair, twin, clean, conditions)
            for each in wanted:
                encoder = load_encoder(each.banked.file)
                if each.digest not in before:
                    before[each.digest] = judge(encoder, twin, each.triggered, bench)
                started = time.process_time()
                repaired = repair_encoder(repair, encoder, clean, conditions)
                seconds = time.process_time() - started
                after = judge(repaired, repaired_twin, each.triggered, bench)
                row = {"repair": name, "spec": spec, "share": share, "group": each.banked.group, "seed": seed}
                row |= {"encoder_sha256": each.digest, "before": before[each.digest], "after": after}
                append_jsonl(file, {**row, "cpu_seconds": round(seconds, 1)})
                asr = after["linear"]["asr"]
                sys.stdout.write(f"{name}, {share:.0%}: {each.banked.group} {seed}: ASR {asr:.3f}\n")
                sys.stdout.flush()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each attack its encoders as they are, and a row for each verified repair and share; means over seeds."""
    rows = [row for row in rows if evidence(row["spec"]["name"]).status == "verified"]
    lines = [f"| {' | '.join(TITLES)} |", f"| --- | --- |{' ---: |' * (len(TITLES) - 2)}"]
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        untouched = {row["encoder_sha256"]: row["before"] for row in of_group}
        lines.append(line(group, "none", "", list(untouched.values()), ""))
        for name, share in sorted({(row["repair"], row["share"]) for row in of_group}, key=place):
            chosen = [row for row in of_group if (row["repair"], row["share"]) == (name, share)]
            seconds = sum(row["cpu_seconds"] for row in chosen) / len(chosen)
            images = f"{share:.0%}" if share else "none"
            lines.append(line(group, name, images, [row["after"] for row in chosen], f"{seconds:.0f}"))
    return "\n".join([*lines, "", "Means over seeds; lifts with Student's 95% interval over them."])


def place(cell: tuple[str, float]) -> tuple[int, str, float]:
    """Where a repair and share stand in the table: as in `REPAIRS`, what is no more there at the end."""
    return (list(REPAIRS).index(cell[0]) if cell[0] in REPAIRS else len(REPAIRS), *cell)


def line(group: str, name: str, images: str, found: Sequence[Found], seconds: str) -> str:
    """One row of the table."""
    return f"| {' | '.join([group, name, images, str(len(found)), *columns(found), seconds])} |"


def repair_table(results: Path) -> str:
    """The table of what has been measured."""
    return table_of(results / FILE, table)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = arguments(__doc__, SEEDS)
    known = sorted({banked.group for banked in bank(RESULTS) if banked.group != CLEAN})
    parser.add_argument("--attacks", nargs="+", default=(), choices=known)
    parser.add_argument("--repairs", nargs="+", default=(), choices=tuple(REPAIRS))
    given = parser.parse_args()
    measure(given.results, given.seeds, *cifar10(given.data_root), attacks=given.attacks, repairs=given.repairs)
    sys.stdout.write(repair_table(given.results) + "\n")


if __name__ == "__main__":
    main()
