"""Detectors on the bank of small encoders: every score as a record, and the tables of docs/defenses/README.md.

Of the clean encoders the even seeds choose thresholds, and the odd ones are what the table is made of; a detector that
learns from clean encoders is given five of the even seeds, which then choose nothing. BadEncoders with each class as
their target (configs/sweeps/bank_classes.yaml) have a table of their own. To run, as often as need be (a minute or less
an encoder on one core): python -m benchmarks.detectors --data-root DIR
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.bank import CLEAN, Banked, arguments, bank, recorded, table_of
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, Defense, EncoderDetector, inspect_encoder, learn_from
from blto.defenses.evidence import Evidence
from blto.evaluation.detection import auroc, expected_average_precision, tpr_at_lowest_fpr
from blto.files import append_jsonl, canonical_json, sha256_file
from blto.records import Metric

FILE, CLASSES_FILE = "detectors.jsonl", "detectors_by_class.jsonl"
CLASSES = "bank_classes"
TWIN = "none (the clean twin)"
DETECTORS: Mapping[str, Mapping[str, Any]] = {
    "DECREE": {"name": "decree"},
    "DECREE, 3 starts": {"name": "decree", "starts": 3},
    "DECREE, 9 windows": {"name": "decree", "starts": 9, "begin": "windows", "epochs": 100},
    "strongest channel": {"name": "channel_outlier"},
    "generator inversion": {"name": "generator_inversion"},
}
REFERENCES = (20, 24, 28, 32, 36)
"""Seeds of the clean encoders that a detector learns from; they choose no threshold."""
IMAGES_SEED = 0


def measure(results: Path, data_root: Path | None, encoders: Sequence[Banked], file: Path) -> None:
    """Score of `encoders` what has not been scored yet."""
    from blto.data import load
    from blto.models.checkpoints import load_encoder
    from blto.runtime.progress import SILENT

    images = load("cifar10", data_root=data_root, split="test").without_labels()
    rows = recorded(file)
    conditions: dict[bytes, Conditions] = {}
    for name, spec in DETECTORS.items():
        detector = DEFENSES.build(spec)
        assert isinstance(detector, EncoderDetector)
        done = scored(rows, spec)
        left = [each for each in encoders if sha256_file(each.file) not in done]
        kind = canonical_json([detector.references, dict(detector.learning)])
        if left and kind not in conditions:
            known = [each for each in bank(results) if each.group == CLEAN and each.seed in REFERENCES]
            references = [load_encoder(each.file) for each in known[: detector.references]]
            conditions[kind] = learn_from(detector, references, images, Conditions(IMAGES_SEED, progress=SILENT))
        for banked in left:
            digest = sha256_file(banked.file)
            found = inspect_encoder(detector, load_encoder(banked.file), images, conditions[kind])
            row = {"detector": name, "spec": DEFENSES.resolve(spec), "group": banked.group, "seed": banked.seed}
            row |= {"encoder_sha256": digest, "score": found.score, "flagged": found.flagged}
            append_jsonl(file, {**row, "measures": dict(found.measures), "seconds": found.seconds})
            sys.stdout.write(f"{name}: {banked.group} {banked.seed}: {found.score:.4f}\n")
            sys.stdout.flush()


def of_classes(results: Path) -> list[Banked]:
    """An encoder tampered with for each class, and the clean one that all of them were before."""
    tampered = list(bank(results, [CLASSES]))
    twins = sorted((results / CLASSES / "clean_twins").glob("*.safetensors")) if tampered else []
    return [*tampered, *(Banked(TWIN, tampered[0].seed, twin) for twin in twins)]


def scored(rows: Sequence[Mapping[str, Any]], spec: Mapping[str, Any]) -> set[str]:
    """The hashes of the encoders' files that a detector has scored."""
    wanted = canonical_json(DEFENSES.resolve(spec))
    return {row["encoder_sha256"] for row in rows if canonical_json(DEFENSES.resolve(row["spec"])) == wanted}


def status_table(results: Path) -> str:
    """A row for each defense: whether it may be relied on, and why."""
    lines = ["| Defense | Status | What it showed here |", "| --- | --- | --- |"]
    for name in DEFENSES.names():
        found, page = evidence(name), cast(type, DEFENSES.get(name)).__module__.rpartition(".")[2]
        lines.append(f"| [{DEFENSES.card(name).title}]({page}.md) | {found.status} | {found.said} |")
    return "\n".join(lines)


def evidence(name: str) -> Evidence:
    """What a defense has shown."""
    return cast(type[Defense], DEFENSES.get(name)).evidence


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each verified detector and attack, from the records."""
    rows = [row for row in rows if evidence(row["spec"]["name"]).status == "verified"]
    titles = ("Detector", "Attack", "Encoders", "AUROC", "AUPRC", "Hits at no false alarm", "False alarms", "Seconds")
    lines = [f"| {' | '.join(titles)} |", f"| --- | --- |{' ---: |' * (len(titles) - 2)}"]
    for name in dict.fromkeys(row["detector"] for row in rows):
        of_detector = [row for row in rows if row["detector"] == name]
        clean = [row for row in of_detector if row["group"] == CLEAN and not_learned_from(row)]
        chosen, judged = ([row["score"] for row in clean if row["seed"] % 2 == odd] for odd in (0, 1))
        seconds = sum(row["seconds"] for row in of_detector) / len(of_detector)
        if not chosen or not judged:
            continue  # not measured yet
        for group in dict.fromkeys(row["group"] for row in of_detector if row["group"] != CLEAN):
            scores = [row["score"] for row in of_detector if row["group"] == group]
            alarms, hits = tpr_at_lowest_fpr(scores, chosen, judged)
            precision = expected_average_precision(scores, judged, 0.5)
            cells = (
                *(name, group, f"{len(scores)}, {len(judged)} clean", shown(auroc(scores, judged), 1, 2)),
                *(f"{precision:.2f}", shown(hits, 100, 0), shown(alarms, 100, 0), f"{seconds:.0f}"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    flagged = [
        f"{name} by its own threshold: "
        + ", ".join(
            f"{sum(row['flagged'] for row in of)} of {len(of)} {group}"
            for group, of in groups.items()
            if group == CLEAN or any(row["flagged"] for row in of)
        )
        + ", of others none."
        for name, groups in by_threshold(rows).items()
    ]
    return "\n".join([*lines, "", *flagged])


def by_class_table(results: Path) -> str:
    """For each target class, how many of the bank's clean encoders score as high, by each verified detector."""
    rows = recorded(results / CLASSES_FILE)
    if not rows:
        return "Not measured yet: `python -m benchmarks.detectors`."
    names = [name for name, spec in DETECTORS.items() if evidence(spec["name"]).status == "verified"]
    clean = [row for row in recorded(results / FILE) if row["group"] == CLEAN and not_learned_from(row)]
    beside = {name: [row["score"] for row in clean if row["detector"] == name] for name in names}
    lines = [f"| {' | '.join(('Tampered for', *names))} |", f"| --- |{' ---: |' * len(names)}"]
    for group in dict.fromkeys(row["group"] for row in rows):
        scores = {row["detector"]: row["score"] for row in rows if row["group"] == group}
        counts = {
            name: sum(other >= score for other in beside[name]) for name, score in scores.items() if name in names
        }
        cells = [f"{counts[name]} of {len(beside[name])}" if name in counts else "" for name in names]
        lines.append(f"| {' | '.join([group, *cells])} |")
    return "\n".join(lines)


def not_learned_from(row: Mapping[str, Any]) -> bool:
    """Whether a row is of an encoder that its detector did not learn from."""
    detector = DEFENSES.build(row["spec"])
    return not (isinstance(detector, EncoderDetector) and detector.references) or row["seed"] not in REFERENCES


def by_threshold(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Detector -> group -> its rows, where the detector has a threshold of its own."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["flagged"] is not None:
            found.setdefault(row["detector"], {}).setdefault(row["group"], []).append(row)
    return found


def shown(metric: Metric, factor: float, digits: int) -> str:
    """A value with its interval."""
    value, low, high = (f"{factor * (number or 0):.{digits}f}" for number in (metric.value, metric.low, metric.high))
    unit = "%" if factor == 100 else ""
    return f"{value}{unit} [{low}, {high}]"


def detector_table(results: Path) -> str:
    """The table of what has been measured."""
    return table_of(results / FILE, table)


def main() -> None:
    """Measure what is missing, and print the table."""
    given = arguments(__doc__).parse_args()
    measure(given.results, given.data_root, list(bank(given.results)), given.results / FILE)
    measure(given.results, given.data_root, of_classes(given.results), given.results / CLASSES_FILE)
    sys.stdout.write(detector_table(given.results) + "\n")


if __name__ == "__main__":
    main()
