"""The benchmark of filters: what a ranking is worth, and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.bank import RESULTS
from benchmarks.filters import FILE, FILTERS, carried_trigger_table, filter_table, judge
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


def test_a_table_of_sets_and_one_of_means(tmp_path: Path) -> None:
    values = {"auroc": 0.9, "auroc_within": 0.8, "average_precision": 0.7, "precision_at_count": 0.6, "seconds": 70.2}
    common = {"filter": "carried trigger", "spec": {"name": "carried_trigger"}}
    for group, seed in (("blto", 3), ("blto", 1), ("patch", 0)):
        append_jsonl(tmp_path / FILE, {**common, "group": group, "seed": seed, **values, "auroc": seed / 10})
    append_jsonl(tmp_path / FILE, {"filter": "f", "spec": {"name": "local_density"}, "group": "blto", "seed": 0})
    assert carried_trigger_table(tmp_path).splitlines()[2:] == [
        "| 1 | 0.100 | 0.800 | 0.700 | 0.600 | 70 |",
        "| 3 | 0.300 | 0.800 | 0.700 | 0.600 | 70 |",
    ]
    first, second = filter_table(tmp_path).splitlines()[2:4]
    assert first.startswith("| blto | carried trigger | 2 | 0.200 (0.100-0.300) | 0.800 (0.800-0.800) |")
    assert second == "| patch | carried trigger | 1 | 0.000 | 0.800 | 0.700 | 0.600 | 70 |"


def test_the_committed_records_are_of_the_present_options() -> None:
    rows = read_jsonl(RESULTS / FILE)
    for name, tried in FILTERS.items():
        of_filter = [row for row in rows if row["filter"] == name]
        assert of_filter
        assert all(row["spec"] == DEFENSES.resolve(tried.spec) and row["group"] in tried.groups for row in of_filter)
    of_blto = [row["seed"] for row in rows if (row["filter"], row["group"]) == ("carried trigger", "blto")]
    assert sorted(of_blto) == list(range(10))
