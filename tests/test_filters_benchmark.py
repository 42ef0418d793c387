"""The benchmark of filters: what a ranking is worth, and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.detectors import RESULTS
from benchmarks.filters import FILE, FILTERS, SEEDS, filter_table, judge
from blto.defenses import DEFENSES
from blto.files import append_jsonl, read_jsonl

POISONS = np.array([1, 4])
OWN = np.array([True, True, False, False, True, True])


def test_a_ranking_with_the_poisons_first_is_perfect_and_one_with_them_last_is_worthless() -> None:
    first = judge(np.array([0.0, 3, 0, 1, 2, 0]), POISONS, OWN)
    assert first == {
        "auroc": 1,
        "auroc_within": 1,
        "average_precision": 1,
        "precision_at_count": 1,
        "prevalence": pytest.approx(1 / 3),
    }
    last = judge(np.array([1.0, 0, 1, 1, 0, 1]), POISONS, OWN)
    assert (last["auroc"], last["precision_at_count"]) == (0, 0)


def test_a_clean_image_of_another_class_counts_against_all_and_not_within_the_class() -> None:
    found = judge(np.array([0.0, 3, 9, 1, 2, 0]), POISONS, OWN)
    assert found["auroc_within"] == 1
    assert found["auroc"] == pytest.approx(6 / 8)
    assert found["precision_at_count"] == 0.5


def test_the_table_has_a_row_for_each_set(tmp_path: Path) -> None:
    values = {"auroc": 0.9, "auroc_within": 0.8, "average_precision": 0.7, "precision_at_count": 0.6, "seconds": 70.2}
    for seed in (3, 1):
        append_jsonl(tmp_path / FILE, {"filter": "f", "seed": seed, **values})
    *_, first, second = filter_table(tmp_path).splitlines()
    assert first == "| f | 1 | 0.900 | 0.800 | 0.700 | 0.600 | 70 |"
    assert second.startswith("| f | 3 |")


def test_the_committed_records_are_of_the_present_options_and_all_seeds() -> None:
    rows = read_jsonl(RESULTS / FILE)
    for name, options in FILTERS.items():
        of_filter = [row for row in rows if row["filter"] == name]
        assert sorted(row["seed"] for row in of_filter) == list(SEEDS)
        assert all(row["spec"] == DEFENSES.resolve(options) for row in of_filter)
