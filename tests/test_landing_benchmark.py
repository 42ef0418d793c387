"""The benchmark of where triggered images go: what it measures, once, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import landing
from benchmarks.bank import Bench, bank, judge, twin_of, victim
from blto.data import load
from blto.evaluation import PROBES
from blto.files import read_jsonl
from blto.models.checkpoints import load_encoder
from blto.records import RunStore
from tests.tiny_experiment import TINY_EXPERIMENT, export_run

ATTACK = {"name": "ssl_backdoor", "target_class": 1, "poison_rate": 0.05, "patch_size": 4}


def test_shares_are_those_of_the_other_classes_and_agree_with_the_asr(tmp_path: Path) -> None:
    results = tmp_path / "results"
    export_run(RunStore(tmp_path / "runs"), {**TINY_EXPERIMENT, "attack": ATTACK}, results / "bank_poisoned", "patch")
    train, test = (load(TINY_EXPERIMENT["data"], split=split) for split in ("train", "test"))
    landing.measure(results, [3], train, test)
    landing.measure(results, [3], train, test)
    (row,) = read_jsonl(results / landing.FILE)
    assert row["target"] == test.class_names[1]
    (banked,) = bank(results)
    bench = Bench(train, test)
    found = judge(load_encoder(banked.file), twin_of(banked), victim(banked, "", bench).triggered, bench)
    for probe in PROBES:
        for encoder, metric in (("victim", "asr"), ("clean_twin", "asr_clean_twin")):
            assert sum(row[encoder][probe]) == pytest.approx(1)
            assert row[encoder][probe][1] == pytest.approx(found[probe][metric])


def test_the_table_names_the_class_that_gets_most() -> None:
    ends = {"linear": [0.1, 0.0, 0.9], "knn": [0.5, 0.3, 0.2]}
    twin = {probe: [0.2, 0.7, 0.1] for probe in ends}
    row = {"group": "patch", "seed": 50, "target": "plane", "classes": ["plane", "car", "ship"]}
    *_, line = landing.table([{**row, "victim": ends, "clean_twin": twin}]).splitlines()
    assert (
        line == "| patch | 50 | plane | ship 90%, target 10% | car 70%, target 20% | plane 50% | car 70%, target 20% |"
    )
