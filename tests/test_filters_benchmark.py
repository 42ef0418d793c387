"""The benchmark of filters: what a ranking is worth, and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks import filters
from benchmarks.bank import RESULTS, bank, poisoned_set
from benchmarks.filters import FILE, FILTERS, carried_trigger_table, filter_table, judge
from blto.data import load
from blto.data.images import ImageSet
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, DatasetFilter
from blto.errors import InputRefused
from blto.files import append_jsonl, read_jsonl
from blto.models.encoder import Encoder
from blto.records import RunStore
from tests.tiny_experiment import TINY_EXPERIMENT, export_run

ATTACK = {"name": "ssl_backdoor", "target_class": 1, "poison_rate": 0.05, "patch_size": 4}
POISONS = np.array([1, 4])
OWN = np.array([True, True, False, False, True, True])


@pytest.fixture
def banks(tmp_path: Path) -> Path:
    """A bank of two victims and their twins, as an export leaves it."""
    store, part = RunStore(tmp_path / "runs"), tmp_path / "results" / "bank_poisoned"
    (part / "clean_twins").mkdir(parents=True)
    for seed in (3, 4):
        export_run(store, {**TINY_EXPERIMENT, "seed": seed, "attack": ATTACK}, part, "patch")
    return tmp_path / "results"


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
    for name, spec in (
        ("carried trigger", "carried_trigger"),
        ("spectral signatures", "spectral"),
        ("f", "local_density"),
    ):
        for group, seed in (("blto", 3), ("blto", 1), ("patch", 0)):
            row = {"filter": name, "spec": {"name": spec}, "group": group, "seed": seed, **values, "auroc": seed / 10}
            append_jsonl(tmp_path / FILE, row)
    assert carried_trigger_table(tmp_path).splitlines()[2:] == [
        "| blto | 1 | 0.100 | 0.800 | 0.700 | 0.600 | 70 |",
        "| blto | 3 | 0.300 | 0.800 | 0.700 | 0.600 | 70 |",
        "| patch | 0 | 0.000 | 0.800 | 0.700 | 0.600 | 70 |",
    ]
    first, second, *rest = filter_table(tmp_path).splitlines()[2:]
    assert first.startswith("| blto | spectral signatures | 2 | 0.200 (0.100-0.300) | 0.800 (0.800-0.800) |")
    assert second == "| patch | spectral signatures | 1 | 0.000 | 0.800 | 0.700 | 0.600 | 70 |"
    assert rest[0] == "", "what is experimental has a row"


def test_each_filter_is_given_the_set_of_its_victim_and_once(banks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, str]] = []

    def score_dataset(
        filtering: DatasetFilter, suspects: ImageSet, encoder: Encoder, conditions: Conditions
    ) -> npt.NDArray[np.float64]:
        assert suspects.labels is None
        given.append((suspects.content_hash, type(filtering).__name__))
        return np.arange(len(suspects), dtype=np.float64)

    monkeypatch.setattr(filters, "score_dataset", score_dataset)
    monkeypatch.setattr(filters, "FILTERS", {"a": {"name": "spectral"}, "b": {"name": "local_density"}})
    train = load(TINY_EXPERIMENT["data"], split="train")
    filters.measure(banks, [3, 4], train)
    rows = read_jsonl(banks / FILE)
    assert [(row["group"], row["seed"], row["filter"]) for row in rows] == [
        ("patch", 3, "a"),
        ("patch", 3, "b"),
        ("patch", 4, "a"),
        ("patch", 4, "b"),
    ]
    victims = [banked for banked in bank(banks) if banked.group == "patch"]
    sets = [poisoned_set(banked, train).training_images().content_hash for banked in victims]
    assert len(set(sets)) == 2
    assert [each for each, _ in given] == [sets[0], sets[0], sets[1], sets[1]]
    assert [row["prevalence"] for row in rows] == [0.05] * 4
    filters.measure(banks, [3, 4], train)
    assert read_jsonl(banks / FILE) == rows
    assert len(given) == 4


def test_another_set_than_the_victim_s_is_refused(banks: Path) -> None:
    other = load({**TINY_EXPERIMENT["data"], "generator_seed": 1}, split="train")
    banked = next(banked for banked in bank(banks) if banked.group == "patch")
    with pytest.raises(InputRefused, match="is not what its victim was trained on"):
        poisoned_set(banked, other)


def test_before_anything_is_measured_the_tables_are_empty(tmp_path: Path) -> None:
    assert len(filter_table(tmp_path).splitlines()) == 4
    assert len(carried_trigger_table(tmp_path).splitlines()) == 2


def test_the_committed_records_are_of_the_present_options() -> None:
    rows = read_jsonl(RESULTS / FILE)
    for name, options in FILTERS.items():
        of_filter = [row for row in rows if row["filter"] == name]
        assert of_filter
        assert all(row["spec"] == DEFENSES.resolve(options) for row in of_filter)
    of_blto = [row["seed"] for row in rows if (row["filter"], row["group"]) == ("carried trigger", "blto")]
    assert sorted(of_blto) == list(range(10))
