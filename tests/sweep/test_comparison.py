"""A declared comparison: read once, when all of its pairs are there, and believed from six of them on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blto.cli import main
from blto.errors import ConfigError
from blto.files import read_json
from blto.files.yaml import dump_yaml
from blto.records import Metric
from blto.report.wording import comparison
from blto.sweep import running
from blto.sweep.comparison import Comparison, ComparisonSpec, compare, paired_seeds
from blto.sweep.export import Exported
from blto.sweep.plan import Sweep, read_sweep
from blto.sweep.results import CellResult, Results
from tests.tiny_experiment import TINY_EXPERIMENT

DECLARED = ComparisonSpec(first="a", second="b")


def result(lift: float, status: str = "done") -> CellResult:
    metrics = {"linear": {"lift": Metric(value=lift, n=10)}, "knn": {"lift": Metric(value=-lift, n=10)}}
    given = {"cell": "c", "run_id": "r", "status": status, "seconds": 1.0, "metrics": metrics}
    return CellResult.model_validate(given)


def results(first: list[float], second: list[float]) -> dict[tuple[str, int], CellResult | None]:
    pairs = [*(("a", i, lift) for i, lift in enumerate(first)), *(("b", i, lift) for i, lift in enumerate(second))]
    return {(name, seed): result(lift) for name, seed, lift in pairs}


def read(found: dict[tuple[str, int], CellResult | None], spec: ComparisonSpec = DECLARED) -> Comparison:
    return compare(spec, sorted({seed for _, seed in found}), found)


def test_six_pairs_of_one_sign_are_established_and_five_are_not() -> None:
    six = read(results([0.5, 0.6, 0.7, 0.5, 0.6, 0.7], [0.1] * 6))
    assert six.mean is not None
    assert six.differences == pytest.approx([0.4, 0.5, 0.6, 0.4, 0.5, 0.6])
    assert six.mean.value == pytest.approx(0.5)
    assert six.mean.n == 6
    assert six.p == pytest.approx(2 / 64)
    assert six.established
    assert "+50.0 points [" in comparison(six.as_json())
    assert comparison(six.as_json()).endswith(
        "over 6 paired seeds, sign-flip test p = 0.031; that a is higher is established."
    )
    five = read(results([0.5, 0.6, 0.7, 0.5, 0.6], [0.1] * 5))
    assert not five.established
    assert comparison(five.as_json()).endswith("p = 0.062; that a is higher is not established.")


def test_the_probe_and_the_metric_are_those_declared_and_a_mixed_sign_is_no_result() -> None:
    other = ComparisonSpec(first="a", second="b", probe="knn")
    assert read(results([0.5], [0.1]), other).differences == pytest.approx([-0.4])
    mixed = read(results([0.5, 0.0, 0.5, 0.0, 0.5, 0.0], [0.2] * 6))
    assert mixed.p is not None
    assert mixed.p > 0.05
    assert not mixed.established
    lower = read(results([0.1] * 6, [0.5, 0.6, 0.7, 0.5, 0.6, 0.7]))
    assert lower.p == pytest.approx(2 / 64)
    assert not lower.established  # the claim is that the first is higher


@pytest.mark.parametrize("missing", [None, result(0.4, "failed"), result(0.4, "stopped")])
def test_nothing_is_shown_while_a_pair_waits(missing: CellResult | None) -> None:
    found = read({**results([0.5] * 6, [0.1] * 6), ("b", 3): missing})
    assert (found.waiting, found.differences, found.mean, found.p) == ([3], (), None, None)
    assert not found.established
    said = "waits for 1 of 6 paired seeds" + (", of which 1 failed;" if found.failed else ";")
    assert said in comparison(found.as_json())
    assert list(found.failed) == ([3] if missing is not None and missing.status == "failed" else [])


def sweep_file(folder: Path, **declared: str) -> Path:
    cells = [
        {"name": "a", "set": {}},
        {"name": "b", "set": {"attack.poison_rate": 0.1}},
        {"name": "c", "set": {"seed": 9}},
    ]
    file = folder / "mine.yaml"
    content = {"base": TINY_EXPERIMENT, "cells": cells, "seeds": [0, 1], "comparison": declared}
    file.write_text(dump_yaml(content))
    return file


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"first": "a", "second": "x"}, "comparison.second: x is unknown; give one of a, b, c."),
        ({"first": "a", "second": "a"}, "cell a is the first as well; give another one."),
        ({"first": "a", "second": "c"}, "cell c has no seed in common with the first; give another one."),
        (
            {"first": "a", "second": "b", "metric": "asrr"},
            "comparison.metric: asrr is unknown; give one of clean_acc",
        ),
        ({"first": "a", "second": "b", "probe": "mlp"}, "comparison.probe: mlp is unknown; give one of linear, knn."),
    ],
)
def test_a_comparison_of_nothing_names_its_line(tmp_path: Path, given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml:\d+: comparison\.") as caught:
        read_sweep(sweep_file(tmp_path, **given))
    assert said in str(caught.value)


def test_a_comparison_reads_which_probes_each_cell_has(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, first="a", second="b")
    file.write_text(file.read_text().replace("set: {}", "set: {probes: {knn: {}}}"))
    with pytest.raises(ConfigError, match=r"linear is not among the probes of cell a; add it there\."):
        read_sweep(file)


def test_a_comparison_needs_the_probe_of_its_cells_distinct_cells_and_a_feasible_number_of_seeds() -> None:
    def pairs(cells: list[tuple[str, int]], probes: tuple[str, ...] = ("linear", "knn")) -> list[int]:
        return paired_seeds(DECLARED, [(name, seed, probes) for name, seed in cells])

    assert pairs([("a", 0), ("b", 0), ("a", 1), ("c", 1)]) == [0]
    with pytest.raises(ConfigError, match=r"linear is not among the probes of cell a; add it there\."):
        pairs([("a", 0), ("b", 0)], ("knn",))
    with pytest.raises(ConfigError, match=r"comparison\.second: b names several cells of one seed"):
        pairs([("a", 0), ("b", 0), ("b", 0)])
    many = [(name, seed) for name in "ab" for seed in range(25)]
    with pytest.raises(ConfigError, match=r"comparison: 25 seeds; the exact test takes at most 24"):
        pairs(many)


def test_a_done_cell_without_the_metric_keeps_its_pair_waiting() -> None:
    empty = result(0.0).model_copy(update={"metrics": {"linear": {"lift": Metric(value=None, n=0)}}})
    assert read({**results([0.5] * 2, [0.1] * 2), ("a", 1): empty}).waiting == [1]


def finished(sweep: Sweep, store: Path, lifts: dict[str, float], seeds: tuple[int, ...]) -> None:
    kept = Results(store, sweep.name)
    for cell in sweep.cells:
        if cell.name in lifts and cell.spec.seed in seeds:
            kept.save(result(lifts[cell.name]).model_copy(update={"cell": cell.id, "run_id": cell.spec.run_id}))


def test_an_export_says_how_it_stands_and_keeps_the_numbers_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "export_cells", lambda *_: Exported())  # there are results, but no runs
    file, store, out = sweep_file(tmp_path, first="a", second="b"), tmp_path / "runs", tmp_path / "out"
    command = ["sweep", str(file), "--store", str(store), "--export", str(out)]
    sweep = read_sweep(file)
    finished(sweep, store, {"a": 0.5, "b": 0.1}, (0,))
    assert main(command) == 0
    assert "waits for 1 of 2 paired seeds" in capsys.readouterr().out
    assert not (out / "comparison.json").exists()
    finished(sweep, store, {"a": 0.5, "b": 0.1}, (1,))
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "+40.0 points [40.0, 40.0] over 2 paired seeds" in said
    assert "1 files copied, 0 unchanged." in said
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["comparison"]["differences"] == pytest.approx([0.4, 0.4])
    assert [Path(file).name for file in document["export"]["unchanged"]] == ["comparison.json"]
    assert read_json(out / "comparison.json")["differences"] == pytest.approx([0.4, 0.4])
    Results(store, sweep.name).file(sweep.cells[0].id).unlink()  # and it waits again
    assert main(command) == 0
    assert not (out / "comparison.json").exists()
