"""The benchmark of repairs: its shares, what it writes and does not make again, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import repairs
from benchmarks.bank import METRICS, Bench, bank, judge, twin_of, victim
from blto.data import load
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, EncoderRepair, repair_encoder
from blto.evaluation import PROBES
from blto.experiment.outcome import TRIGGER
from blto.files import read_jsonl
from blto.models.checkpoints import load_encoder, save_encoder
from blto.models.encoder import build_encoder
from blto.poisoning import PatchTrigger, save_trigger
from blto.records import RunRecord, RunStore
from tests.factories import TINY_BACKBONE, TINY_METHODS

SYNTHETIC = {"name": "synthetic", "train_size": 200, "test_size": 40, "image_size": 16}
TRAIN, TEST = (load(SYNTHETIC, split=split) for split in ("train", "test"))
ENTRIES = {"clp": "clp:CLP", "clean_fine_tuning": "clean_fine_tuning:CleanFineTuning"}
TINY = {
    "CLP": {"name": "clp", "u": 2.0},
    "fine-tuning": {"name": "clean_fine_tuning", "epochs": 1, "batch_size": 8, "method": TINY_METHODS["simclr"]},
}


@pytest.fixture(autouse=True)
def tiny_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, where in ENTRIES.items():
        monkeypatch.setitem(DEFENSES._entries, name, f"blto.defenses.{where}")
    monkeypatch.setattr(repairs, "REPAIRS", TINY)
    monkeypatch.setattr(repairs, "SHARES", (0.05, 0.1))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A bank of two attacks and their twin."""
    results = tmp_path / "results"
    trigger = PatchTrigger(
        torch.zeros(3, 4, 4, dtype=torch.uint8), seed=0, placement=(0.0, 1.0), test_placement=(0.0, 1.0)
    )
    for number, (part, group) in enumerate(
        (("bank_clean", "clean"), ("bank_poisoned", "patch"), ("bank_poisoned", "blto"))
    ):
        identity = f"{group}-synthetic-s0-{number:010d}"
        record = RunRecord(
            run_id=identity,
            spec={"seed": 0, "attack": {"name": group, "target_class": 1}},
            metrics={},
            took=False,
            provenance={"poison": {"trigger_sha256": trigger.identity}, "stages": {"clean_twin": "twin"}},
        )
        RunStore(results / part).save(record)
        folder = results / part / f"{group}-s0-{number:010d}"
        (results / part / identity).rename(folder)
        encoder = build_encoder(TINY_BACKBONE, seed=number, image_size=16)
        save_encoder(folder / "encoder.safetensors", encoder, TINY_BACKBONE, 16)
        save_trigger(folder / TRIGGER, trigger)
    twin = build_encoder(TINY_BACKBONE, seed=7, image_size=16)
    save_encoder(results / "bank_poisoned" / "clean_twins" / "twin.safetensors", twin, TINY_BACKBONE, 16)
    return results


def test_every_share_takes_as_many_steps_and_what_needs_no_image_comes_once() -> None:
    assert [(share, spec["u"]) for share, spec in repairs.variants(TINY["CLP"], 1000)] == [(0.0, 2.0)]
    found = list(repairs.variants({**TINY["fine-tuning"], "epochs": 10}, 1000))
    assert [(share, spec["images"], spec["epochs"]) for share, spec in found] == [(0.05, 50, 20), (0.1, 100, 10)]


def test_a_line_for_each_repair_share_and_encoder_and_none_is_made_again(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repairs.measure(results, [0], TRAIN, TEST)
    rows = read_jsonl(results / repairs.FILE)
    assert sorted((row["group"], row["repair"], row["share"]) for row in rows) == [
        (group, repair, share)
        for group in ("blto", "patch")
        for repair, share in (("CLP", 0.0), ("fine-tuning", 0.05), ("fine-tuning", 0.1))
    ]
    for row in rows:
        assert set(row["before"]) == set(row["after"]) == set(PROBES)
        assert set(row["after"]["linear"]) == set(METRICS)
    assert rows[0]["before"] == next(row["before"] for row in rows if row["group"] == rows[0]["group"])

    monkeypatch.setattr(repairs, "victim", None)  # nothing is left to do
    repairs.measure(results, [0], TRAIN, TEST)
    assert read_jsonl(results / repairs.FILE) == rows


def test_what_is_missing_is_made_as_if_it_had_been_made_at_once(results: Path) -> None:
    file = results / repairs.FILE
    repairs.measure(results, [0], TRAIN, TEST)
    rows = read_jsonl(file)
    file.unlink()
    repairs.measure(results, [0], TRAIN, TEST, attacks=["patch"], repairs=["CLP"])
    (first,) = read_jsonl(file)
    assert (first["group"], first["repair"]) == ("patch", "CLP")
    repairs.measure(results, [0], TRAIN, TEST)

    def told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        plain = ({key: value for key, value in row.items() if key != "cpu_seconds"} for row in rows)
        return sorted(plain, key=lambda row: (row["repair"], row["share"], row["group"]))

    assert told(read_jsonl(file)) == told(rows)


def test_the_twin_is_repaired_in_the_same_way(results: Path) -> None:
    repairs.measure(results, [0], TRAIN, TEST)
    row = next(row for row in read_jsonl(results / repairs.FILE) if row["share"] == 0.1 and row["group"] == "blto")
    repair = DEFENSES.build(row["spec"])
    assert isinstance(repair, EncoderRepair)
    banked = next(banked for banked in bank(results) if banked.group == "blto")
    encoder, twin = (
        repair_encoder(repair, each, TRAIN.without_labels(), Conditions(0))
        for each in (load_encoder(banked.file), twin_of(banked))
    )
    bench = Bench(TRAIN, TEST)  # fewer than PROBE_IMAGES, so all of them
    assert judge(encoder, twin, victim(banked, "", bench).triggered, bench) == row["after"]


def row(seed: int, *, asr: float, share: float = 0.1, repair: str = "fine-tuning") -> dict[str, Any]:
    before = {probe: {name: 0.9 for name in METRICS} for probe in PROBES}
    after = {probe: {**before[probe], "asr": asr, "lift": asr - 0.1} for probe in PROBES}
    spec = {"name": "clean_fine_tuning" if share else "clp"}
    told = {"repair": repair, "share": share, "group": "patch", "seed": seed, "encoder_sha256": str(seed)}
    return {**told, "spec": spec, "before": before, "after": after, "cpu_seconds": 20.0 + 10 * seed}


def test_the_table_has_each_repair_beside_the_encoders_as_they_were() -> None:
    rows = [row(0, asr=0.2), row(1, asr=0.4), row(0, asr=0.6, share=0.05), row(0, asr=0.8, share=0, repair="CLP")]
    lines = repairs.table(rows).splitlines()[2:6]
    assert [line.split(" | ")[1:4] for line in lines] == [
        ["none", "", "2"],
        ["CLP", "none", "1"],
        ["fine-tuning", "5%", "1"],
        ["fine-tuning", "10%", "2"],
    ]
    assert lines[0].startswith("| patch | none |  | 2 | 90.0% | 90.0 [90.0, 90.0] |")
    assert "| 30.0% | 20.0 [" in lines[3]
    assert lines[3].endswith("| 25 |")


def test_before_anything_is_measured_the_table_says_how(tmp_path: Path) -> None:
    assert repairs.repair_table(tmp_path) == "Not measured yet: `python -m benchmarks.repairs`."
