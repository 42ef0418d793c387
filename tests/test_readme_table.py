"""The tables of the README and the documentation are those that the committed records give."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TABLES = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))


@pytest.mark.parametrize("page", TABLES["PAGES"], ids=lambda page: page.name)
def test_the_tables_are_up_to_date(page: Path) -> None:
    assert TABLES["with_tables"](page.read_text(), ROOT / "benchmarks" / "results") == page.read_text()


def test_every_table_is_on_some_page() -> None:
    pages = "".join(page.read_text() for page in TABLES["PAGES"])
    assert [name for name in TABLES["TABLES"] if f"<!-- {name}:begin -->" not in pages] == []


def test_accuracy_near_a_minute_is_shown_and_far_from_it_is_not(tmp_path: Path) -> None:
    curve = [
        {"minutes": minutes, "knn_accuracy": accuracy} for minutes, accuracy in ((0.0, 9.0), (5.4, 50.0), (28.9, 70.0))
    ]
    (tmp_path / "accuracy_over_time.json").write_text(json.dumps({"contenders": {"ours": {"curve": curve}}}))
    row = TABLES["accuracy_table"](tmp_path).splitlines()[-1]
    assert row == "| ours | 50.0% | - | - | - | - | 70.0% | 70.0% in 28.9 min |"


def cell(**changes: float) -> dict[str, float]:
    given: dict[str, float] = {"batch_size": 256, "width": 16, "resolution": 32, "images": 50_000, "threads": 2}
    given |= {"processes": 1, "images_per_second": 1234.5, "cpu_seconds_per_1000_images": 1.234}
    return given | {"anonymous_mib": 873.8, "peak_mib": 1445.9, "foreign": 0.1} | changes


RECORD: dict[str, Any] = {
    "machine": {"processor": "Some CPU", "cores": 2},
    "engine": "AMX kernels",
    "cells": {
        "c": cell(processes=2, threads=1, foreign=0.3),
        "b": cell(batch_size=1024),
        "a": cell(),
    },
    "summary": {"two_processes_over_two_threads": 1.058, "anonymous_memory_most_over_few_images": 1.011},
    "parts": {"stages": {"costs": {"poisoning": {"unit": "poisoned image", "seconds": 0.0027384}}}},
}


def test_the_table_of_scaling(tmp_path: Path) -> None:
    """A cell that was disturbed shows its memory and no speed."""
    (tmp_path / "scaling.json").write_text(json.dumps(RECORD))
    readme = TABLES["with_tables"]("a\n<!-- scaling:begin -->\nold\n<!-- scaling:end -->\nz\n", tmp_path)
    assert readme.startswith("a\n<!-- scaling:begin -->\n| Batch |")
    assert readme.endswith("\n<!-- scaling:end -->\nz\n")
    assert "old" not in readme
    rows = readme.splitlines()
    assert rows[4:7] == [
        "| 256 | 16 | 32 | 50,000 | 1 x 2 | 1,234 | 1.23 | 874 | 1,446 |",
        "| 1024 | 16 | 32 | 50,000 | 1 x 2 | 1,234 | 1.23 | 874 | 1,446 |",
        "| 256 | 16 | 32 | 50,000 | 2 x 1 | - | - | 874 | 1,446 |",
    ]
    assert "Some CPU, 2 cores, AMX kernels. Memory is summed over processes." in rows
    assert "Anonymous memory with 10,000,000 images / with 50,000: 1.01 (at most 1.1)." in rows
    assert "Two single-thread trainings side by side / one with two threads: 1.06 in images/s." in rows
    assert "| poisoning | poisoned image | 0.00274 |" in rows


def test_a_table_without_its_record_or_its_marks(tmp_path: Path) -> None:
    assert "make bench-scaling" in TABLES["scaling_table"](tmp_path)
    assert TABLES["with_tables"]("no marks\n", tmp_path) == "no marks\n"
