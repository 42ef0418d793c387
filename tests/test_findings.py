"""The tables of docs/findings.md say what the records say, in the definitions of the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import findings, probe_draws
from blto.evaluation import Features, fit_probe
from blto.files import append_jsonl
from blto.records import Metric, RunRecord, RunStore


def record(**changes: Any) -> RunRecord:
    def rows(asr: float, untriggered: float) -> list[dict[str, Any]]:
        judged = {"knn_asr": asr, "knn_untriggered_rate": untriggered, "knn_clean_accuracy": 0.7, "linear_asr": asr}
        return [{"epoch": float(epoch), **judged} for epoch in (0, 1, 2)]

    metrics = {name: Metric(value=value, low=0.0, high=1.0, n=10) for name, value in (("asr", 0.6), ("lift", 0.5))}
    given = {
        "run_id": "blto-x-s7-0123456789",
        "spec": {
            "seed": 7,
            "held_out": 5000,
            "attack": {"name": "blto"},
            "pretraining": {"method": {"name": "simclr"}},
        },
        "metrics": {"linear": metrics},
        "took": True,
        "trajectory": rows(0.6, 0.2),
        "trajectory_clean_twin": rows(0.1, 0.0),
        "provenance": {"poison": {"images": 450}},
    }
    return RunRecord.model_validate({**given, **changes})


def test_a_path_leaves_the_start_out_and_its_lift_is_over_the_larger_of_both_references() -> None:
    path = findings.path_of(record(), "knn")
    assert path is not None
    assert (path.attack, list(path.exposures), list(path.accuracy)) == ("BLTO", [450.0, 900.0], [0.7, 0.7])
    assert list(path.lift) == pytest.approx([0.4, 0.4])  # 0.6 - 0.2 without a trigger, not - 0.1 of the twin
    assert findings.path_of(record(trajectory_clean_twin=[]), "knn") is None
    other = findings.path_of(record(spec={**record().spec, "pretraining": {"method": {"name": "byol"}}}), "knn")
    assert other is not None
    assert other.attack == "BLTO, BYOL"
    ctrl = {"name": "ctrl", "magnitude": 50.0, "test_magnitude": 100.0}
    strong = findings.path_of(record(spec={**record().spec, "attack": ctrl}), "knn")
    assert strong is not None
    assert strong.attack == "CTRL 50/100"


def test_a_table_has_a_row_a_cell_and_the_spread_over_the_last_snapshots(tmp_path: Path) -> None:
    gate = tmp_path / "gate9"
    assert findings.table(gate) == "Not run yet."
    RunStore(gate).save(record(run_id="mine_1-s7-0123456789"))
    lines = findings.table(gate).splitlines()
    assert lines[2].startswith("| mine_1 | 7 | 60.0% [0.0, 100.0] | \N{EN DASH} | 50.0 [0.0, 100.0] |")
    assert lines[2].endswith("| 60.0% (sd 0.0 points) | CPU |")
    assert lines[4].startswith("5,000 held-out training images.")


def test_the_map_has_the_first_seed_of_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "FIGURES", tmp_path)
    for name, seed in (("a", 3), ("a", 4), ("b", 4)):
        given = record(run_id=f"{name}-s{seed}-0123456789", spec={**record().spec, "seed": seed})
        RunStore(tmp_path / "gate9").save(given)
    findings.draw_map([tmp_path / "gate9"], "knn")
    rows = (tmp_path / "exposure_map_knn.csv").read_text().splitlines()[1:]
    assert sorted({row.split(",")[0] for row in rows}) == ["a-s3", "b-s4"]


def test_a_table_names_the_gpu_that_trained_a_victim(tmp_path: Path) -> None:
    trained_on = {"victim": {"device": "cuda", "processor": "Some GPU"}}
    RunStore(tmp_path).save(record(provenance={"trained_on": trained_on}))
    assert findings.table(tmp_path).splitlines()[2].endswith("| Some GPU |")


def test_the_table_over_seeds_has_a_row_a_name_and_probe_with_two_seeds_or_more(tmp_path: Path) -> None:
    names = ("asr", "asr_clean_twin", "lift", "clean_accuracy", "clean_accuracy_clean_twin")
    for seed, lift in ((0, 0.1), (1, 0.3)):
        metrics = {"knn": {**{name: Metric(value=0.5, n=10) for name in names}, "lift": Metric(value=lift, n=10)}}
        given = {"metrics": metrics, "took": False, "spec": {**record().spec, "seed": seed}}
        assert findings.seeds_table(tmp_path) == "Not run yet."
        RunStore(tmp_path).save(record(run_id=f"mine-s{seed}-0123456789", **given))
    (line,) = findings.seeds_table(tmp_path).splitlines()[2:-2]
    assert line.startswith("| mine | knn | 2 | 50.0% [50.0, 50.0] | 50.0% [50.0, 50.0] | 20.0 [")


def test_the_table_of_displacements_shows_the_last_snapshot_of_victim_and_twin(tmp_path: Path) -> None:
    assert findings.displacement_table([tmp_path]) == "Not measured yet."
    store = RunStore(tmp_path / "gate9")
    store.save(record(run_id="old-s7-0123456789"))  # which has not measured it
    rows = [{"epoch": e, "shift": e / 2, "advance": 0.5, "heading": 0.25} for e in (0.0, 1.0)]
    twin = [{**rows[1], "shift": 0.1}]
    store.save(record(run_id="new-s7-0123456789", trajectory=rows, trajectory_clean_twin=twin))
    (line,) = findings.displacement_table([tmp_path / "gate9"]).splitlines()[2:]
    assert line == "| new | gate9 | 7 | 0.50, 0.10 | 0.50, 0.50 | 0.25, 0.25 | 60.0% | \N{EN DASH} |"


@pytest.mark.parametrize(
    ("lifts", "reached"),
    [
        ((0.1, 0.2, 0.31), "8,33"),
        ((0.1, 0.1001, 0.1002), "more than 1,000,000,000,000"),
        ((0.1, -0.2, 0.1), "no rise"),
    ],
)
def test_a_trend_is_followed_only_where_it_is_sure_to_rise(
    tmp_path: Path, lifts: tuple[float, ...], reached: str
) -> None:
    assert findings.trend_table([tmp_path]) == "Not enough cells yet."
    for number, lift in enumerate(lifts):
        rows = [{"epoch": 10.0**number, "knn_asr": 0.5, "knn_untriggered_rate": 0.0, "knn_clean_accuracy": 0.7}]
        metrics = {"knn": {"lift": Metric(value=lift, n=10)}}
        changes = {"trajectory": rows, "trajectory_clean_twin": rows, "metrics": metrics, "took": False}
        provenance = {"poison": {"images": 100}}
        given = record(run_id=f"blto-x-s{number}-0123456789", **changes, provenance=provenance)
        RunStore(tmp_path).save(given)
    (line,) = findings.trend_table([tmp_path]).splitlines()[2:]
    assert line.startswith("| BLTO | knn | 3 | 100 to 10,000 | ")
    slope, last = line.split(" | ")[-2:]
    assert slope.startswith(f"{50 * (lifts[2] - lifts[0]):+.1f} [")
    assert last.startswith(reached)


def test_no_trend_goes_through_two_places(tmp_path: Path) -> None:
    for number, epoch in enumerate((10.0, 10.5, 1000.0)):
        rows = [{"epoch": epoch, "knn_asr": 0.5, "knn_untriggered_rate": 0.0, "knn_clean_accuracy": 0.7}]
        changes = {"trajectory": rows, "trajectory_clean_twin": rows, "took": False}
        metrics = {"knn": {"lift": Metric(value=0.1 * number, n=10)}}
        RunStore(tmp_path).save(record(run_id=f"blto-x-s{number}-0123456789", **changes, metrics=metrics))
    assert findings.trend_table([tmp_path]) == "Not enough cells yet."


def test_the_table_of_draws_has_a_row_an_encoder_and_probe(tmp_path: Path) -> None:
    file = tmp_path / "draws.jsonl"
    assert findings.draws_table(file) == "Not run yet."
    asr = {"victim": {"linear": {"10000": [1.0, 2.0], "45000": [3.0]}}, "clean twin": {"linear": {"45000": [0.5]}}}
    append_jsonl(file, {"run": "r", "attack": "blto", "asr": asr})
    lines = findings.draws_table(file).splitlines()
    assert lines[0] == "| Attack | Run | Encoder | Probe | 10,000 images | 45,000 images |"
    assert lines[2:] == [
        "| blto | r | clean twin | linear |  | 0.5% |",
        "| blto | r | victim | linear | 1.0%, 2.0% | 3.0% |",
    ]


def test_a_probe_of_few_images_is_drawn_several_times_and_that_of_all_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_draws, "DRAWS", {30: 3, 500: 2})
    generator = torch.Generator().manual_seed(0)
    vectors, labels = torch.randn(100, 4, generator=generator), torch.arange(100) % 2
    rows = torch.arange(100)
    clean, changed = Features(vectors, labels, rows), Features(vectors + 0.3, labels, rows)
    found = probe_draws.draws(clean, clean, changed, {"knn": {"k": 1}, "linear": {}}, 1)
    assert {probe: {size: len(values) for size, values in of.items()} for probe, of in found.items()} == {
        "knn": {"30": 3, "100": 1},
        "linear": {"30": 3, "100": 1},
    }
    assert len(set(found["linear"]["30"])) > 1, "draws differ"
    predicted = fit_probe("knn", clean, 2, k=1)(changed.vectors)
    share = (torch.as_tensor(predicted)[labels == 0] == 1).double().mean()
    assert found["knn"]["100"] == [round(100 * float(share), 1)]


def test_the_table_of_levers_names_both_encoders(tmp_path: Path) -> None:
    file = tmp_path / "levers.jsonl"
    assert findings.levers_table(file) == "Not run yet."
    asr = {"linear": 12.5, "knn": 25.0, "linear, views": 5.0, "knn, views": 10.0}
    near = {"triggered": 0.25, "clean": 0.0, "target": 0.5}
    line = {"name": "x", "encoders": ["a", "b"], "asr": {"a": asr, "b": asr}, "similarity": near, "core_seconds": 9.6}
    append_jsonl(file, line)
    row = findings.levers_table(file).splitlines()[-1]
    assert row == "| x | 0.25, 0.50 | 12.5% / 25.0% | 5.0% / 10.0% | 12.5% / 25.0% | 10 |"
