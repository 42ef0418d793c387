"""The benchmark of scaling: what is measured, in which order, and what a later call measures again."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling import FEW_IMAGES, MOST_IMAGES, Cell
from blto.files import read_json


def found(cell: Cell, foreign: float = 0.0) -> dict[str, Any]:
    rate, memory = (180.0, 900.0) if cell.processes == 2 else (200.0, 909.0 if cell.images == MOST_IMAGES else 900.0)
    return {"images_per_second": rate, "anonymous_mib": memory, "foreign": foreign}


def test_a_call_that_was_cut_off_goes_on_and_what_was_disturbed_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Cell] = []

    def measure(cell: Cell, seconds: float) -> dict[str, Any]:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(cell)
        return found(cell, foreign=0.5 if len(measured) == 2 else 0.0)

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "measure_stages", lambda *_: {"foreign": 0.0})
    given = Namespace(out=tmp_path / "scaling.json", only="", seconds=1, stage_images=1, steps=1)
    record: dict[str, Any] = {"cells": {}, "parts": {}}
    with pytest.raises(KeyboardInterrupt):
        scaling.complete(record, given)
    record = read_json(given.out)
    assert [cell.key for cell in measured] == list(dict.fromkeys(cell.key for cell in scaling.cells()))[:5]
    monkeypatch.setattr(scaling, "measure", lambda cell, _: measured.append(cell) or found(cell))  # type: ignore[func-returns-value]
    scaling.complete(record, given)
    assert [measured.count(cell) for cell in dict.fromkeys(scaling.cells())][:3] == [1, 2, 1]
    record = read_json(given.out)
    assert set(record["cells"]) == {cell.key for cell in scaling.cells()}
    assert record["parts"]["stages"] == {"foreign": 0.0}
    assert record["summary"] == pytest.approx(
        {"anonymous_memory_most_over_few_images": 1.01, "two_processes_over_two_threads": 0.9}
    )


def test_the_axes_cover_what_was_asked_for() -> None:
    cells = list(scaling.cells())
    assert {cell.batch_size for cell in cells} == {32, 64, 128, 256, 512, 1024}
    assert {cell.width for cell in cells} == {16, 32, 64}
    assert {cell.resolution for cell in cells} == {32, 64, 96, 224}
    assert {10**power for power in range(3, 8)} | {FEW_IMAGES} == {cell.images for cell in cells}
    assert {(cell.processes, cell.threads) for cell in cells} == {(1, 2), (1, 1), (2, 1)}
    assert all(cell.batch_size <= cell.images for cell in cells)


@pytest.mark.full  # two processes load torch
def test_a_cell_of_two_processes_is_measured_for_real() -> None:
    cell = Cell(batch_size=32, resolution=8, images=64, threads=1, processes=2)
    made = scaling.measure(cell, seconds=0)
    assert made["images_per_second"] > 0
    assert made["cpu_seconds_per_1000_images"] > 0
    assert 2 * 100 < made["anonymous_mib"] < made["peak_mib"]
    assert made["foreign"] >= 0
