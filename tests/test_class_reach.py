"""The benchmark of how easily classes are reached: what it measures, once, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks import class_reach
from benchmarks.bank import Bench, Triggered, bank, judge
from blto.data import load
from blto.defenses.cluster_triggers import Search
from blto.evaluation import PROBES
from blto.files import read_jsonl
from blto.models.checkpoints import load_encoder, save_encoder
from blto.models.encoder import build_encoder
from blto.poisoning import AdditiveTrigger, Budget, apply_to_uint8
from blto.records import RunRecord, RunStore
from tests.factories import TINY_BACKBONE

TRAIN, TEST = (
    load({"name": "synthetic", "train_size": 120, "test_size": 40, "image_size": 16}, split=split)
    for split in ("train", "test")
)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bank of three clean encoders."""
    for name, value in (("LEARNED_ON", (0,)), ("JUDGED_ON", (1, 2)), ("IMAGES", 60), ("CLUSTERS", 3)):
        monkeypatch.setattr(class_reach, name, value)
    monkeypatch.setattr(class_reach, "SEARCH", Search(8 / 255, width=4, steps=2, batch_size=8, lr=1e-3, starts=1))
    for seed in range(3):
        identity = f"clean-synthetic-s{seed}-{seed:010d}"
        record = RunRecord(run_id=identity, spec={"seed": seed}, metrics={}, took=False, provenance={})
        RunStore(tmp_path / "bank_clean").save(record)
        folder = tmp_path / "bank_clean" / f"clean-s{seed}-{seed:010d}"
        (tmp_path / "bank_clean" / identity).rename(folder)
        encoder = build_encoder(TINY_BACKBONE, seed=seed, image_size=16)
        save_encoder(folder / "encoder.safetensors", encoder, TINY_BACKBONE, 16)
    return tmp_path


def test_each_class_has_its_own_trigger_judged_on_every_encoder(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triggers = [
        AdditiveTrigger(torch.full((3, 16, 16), 0.1 * target), Budget(1)) for target in range(TRAIN.num_classes)
    ]
    asked: list[npt.NDArray[np.int64]] = []

    def invert_clusters(*given: Any) -> Any:
        asked.append(given[3])
        return iter(triggers)

    monkeypatch.setattr(class_reach, "invert_clusters", invert_clusters)
    monkeypatch.setattr(class_reach, "common_clusters", lambda *_: np.arange(60) % 3)
    class_reach.measure(results, TRAIN, TEST)
    assert TRAIN.labels is not None
    assert np.array_equal(asked[0], TRAIN.labels[:60])
    rows = read_jsonl(results / class_reach.FILE)
    assert [row["class"] for row in rows] == list(TRAIN.class_names)
    bench = Bench(TRAIN, TEST)  # fewer than PROBE_IMAGES, so all of them
    judged = {banked.seed: banked for banked in bank(results) if banked.seed}
    for target, (row, trigger) in enumerate(zip(rows, triggers, strict=True)):
        triggered = apply_to_uint8(trigger, TEST.images)
        for found, banked in zip(row["found"], judged.values(), strict=True):
            encoder = load_encoder(banked.file)
            expected = judge(encoder, encoder, Triggered(triggered, target), bench)
            assert {probe: found[probe]["asr"] for probe in PROBES} == {
                probe: expected[probe]["asr"] for probe in PROBES
            }
        of_class = np.bincount(np.arange(60)[TRAIN.labels[:60] == target] % 3)
        assert row["in_cluster"] == pytest.approx(of_class.max() / of_class.sum())
        assert row["of_cluster"] == pytest.approx(of_class.max() / 20)
    assert len({str(row["found"]) for row in rows}) > 1

    monkeypatch.setattr(class_reach, "invert_clusters", None)  # nothing is left to do
    class_reach.measure(results, TRAIN, TEST)


def test_a_trigger_is_learned_for_each_class(results: Path) -> None:
    class_reach.measure(results, TRAIN, TEST)
    rows = read_jsonl(results / class_reach.FILE)
    assert [set(found) for row in rows for found in row["found"]] == [set(PROBES)] * 2 * TRAIN.num_classes


def test_the_table_begins_with_the_class_that_is_reached_most_easily() -> None:
    def row(name: str, *asr: float) -> dict[str, object]:
        found = [{probe: {"asr": value, "untriggered_rate": 0.01} for probe in PROBES} for value in asr]
        return {"class": name, "found": found, "in_cluster": 0.5, "of_cluster": 0.25}

    *_, first, second = class_reach.table([row("airplane", 0.1, 0.2), row("frog", 0.6, 0.7)]).splitlines()
    assert first == "| frog | 65.0% (60.0-70.0) | 65.0% (60.0-70.0) | 1.0% (1.0-1.0) | 50% | 25% |"
    assert second.startswith("| airplane | 15.0% (10.0-20.0) |")
