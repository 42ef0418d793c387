"""The benchmark of how easily classes are reached: what it measures, that it goes on, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import class_reach
from blto.data import load
from blto.defenses.cluster_triggers import Search
from blto.evaluation import PROBES
from blto.files import read_jsonl
from blto.models.checkpoints import save_encoder
from blto.models.encoder import build_encoder
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


def test_every_class_is_judged_on_every_encoder_and_not_again(results: Path) -> None:
    class_reach.measure(results, TRAIN, TEST)
    file = results / class_reach.FILE
    rows = read_jsonl(file)
    assert [row["class"] for row in rows] == list(TRAIN.class_names)
    for row in rows:
        assert [set(found) for found in row["found"]] == [set(PROBES)] * 2
        assert row["found"][0] != row["found"][1]
        assert 1 / 3 <= row["in_cluster"] <= 1
        assert 0 < row["of_cluster"] <= 1

    whole = file.read_text()
    class_reach.measure(results, TRAIN, TEST)
    assert file.read_text() == whole
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    class_reach.measure(results, TRAIN, TEST)
    assert file.read_text() == whole


def test_the_table_begins_with_the_class_that_is_reached_most_easily() -> None:
    def row(name: str, *asr: float) -> dict[str, object]:
        found = [{probe: {"asr": value, "untriggered_rate": 0.01} for probe in PROBES} for value in asr]
        return {"class": name, "found": found, "in_cluster": 0.5, "of_cluster": 0.25}

    *_, first, second = class_reach.table([row("airplane", 0.1, 0.2), row("frog", 0.6, 0.7)]).splitlines()
    assert first == "| frog | 65.0% (60.0-70.0) | 65.0% (60.0-70.0) | 1.0% (1.0-1.0) | 50% | 25% |"
    assert second.startswith("| airplane | 15.0% (10.0-20.0) |")
