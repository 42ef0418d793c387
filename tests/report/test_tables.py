"""Tables: values with their intervals, the clean twin beside the ASR, and no text that acts as markup."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from blto.records import Metric, RunRecord
from blto.report import markdown_table, results_table
from blto.report.tables import Row, probes, rows_over_seeds, table_rows
from blto.report.wording import interval, lookup, percent, points, with_interval

MakeRecord = Callable[..., RunRecord]


def printed(records: list[RunRecord], probe: str = "linear", width: int = 80) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(results_table(records, probe))
    return buffer.getvalue()


def test_a_run_on_held_out_images_says_so(make_record: MakeRecord) -> None:
    record = make_record()
    held_out = record.model_copy(update={"spec": {**record.spec, "held_out": 5000}})
    assert [row.data for row in table_rows([record, held_out])] == ["cat", "cat, 5,000 held out"]


def test_numbers_in_words() -> None:
    metric = Metric(value=0.9312, low=0.924, high=0.937, n=9000)
    assert with_interval(metric) == "93.1% [92.4, 93.7]"
    assert with_interval(Metric(value=0.5, n=2)) == "50.0%"
    assert with_interval(Metric(value=None, n=0)) == with_interval(None) == percent(None) == "\u2013"
    assert (points(0.85), points(-0.012), points(None)) == ("+85.0 points", "-1.2 points", "\u2013")
    assert interval(Metric(value=0, low=-0.011, high=0.02, n=3)) == "[-1.1, 2.0]"
    assert percent(0.0005, 2) == "0.05%"
    assert lookup({"a": {"b": 1}}, "a.b") == 1
    assert lookup({"a": 3}, "a.b") is None


def test_the_terminal_table_fits_eighty_columns_and_tells_everything(make_record: MakeRecord) -> None:
    spec = {
        "attack": {"name": "untrained_generator", "poison_rate": 0.005, "epsilon": 16 / 255},
        "data": {"name": "cifar10"},
        "pretraining": {"method": {"name": "simclr"}},
        "seed": 7,
    }
    lines = printed([make_record(spec=spec), make_record(lift=-0.05)]).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "\u2026" not in text
    first = text[text.index("untrained_generator") :].splitlines()[:5]
    assert first[0].split() == ["untrained_generator", "85.0%", "91.0%", "6.0%", "2.1%", "87.4%"]
    assert first[1].split()[2:4] == ["[84.0,86.0]", "[90.0,92.0]"]
    assert first[2].startswith("0.50% poison ")
    assert [line.strip() for line in first[3:]] == ["epsilon 16/255", "seed 7"]
    assert "took" in first[2]
    assert "n 10,000" in first[2]
    assert "not taken" in text


def test_an_attack_without_a_budget_shows_what_it_reached(make_record: MakeRecord) -> None:
    def row(attack: str = "ctrl", poisons: float | None = 11 / 255, test: float | None = 22 / 255) -> Row:
        provenance = {} if poisons is None else {"poison": {"epsilon_reached": poisons}}
        stealth = {} if test is None else {"linf": test}
        return table_rows([make_record(spec={"attack": {"name": attack}}, provenance=provenance, stealth=stealth)])[0]

    assert row().epsilon == "none: 11 and 22/255"
    assert row(poisons=22 / 255).epsilon == row(poisons=None).epsilon == "none: 22/255"
    assert row(poisons=None, test=None).epsilon == "\u2013"
    assert row("clean").epsilon == "\u2013"
    runs = [
        make_record(str(seed), spec={"attack": {"name": "ctrl"}, "seed": seed}, stealth={"linf": linf / 255})
        for seed, linf in ((1, 22), (2, 21))
    ]
    assert [each.epsilon for each in (*table_rows(runs), *rows_over_seeds(runs))] == [
        "none: 22/255",
        "none: 21/255",
        "none",
    ]


def test_only_the_headline_probe_says_took(make_record: MakeRecord) -> None:
    assert "took" not in printed([make_record()], "knn")
    assert probes([make_record(), make_record(metrics={"z": {}, "a": {}}, took=False)]) == ["linear", "a", "knn", "z"]
    missing = table_rows([make_record()], "attentive")[0]
    assert (missing.metrics, missing.n) == ({}, "\u2013")


def test_the_markdown_table(make_record: MakeRecord) -> None:
    table = markdown_table([make_record(), make_record(lift=None), make_record(spec={"attack": {"name": "clean"}})])
    lines = table.splitlines()
    assert lines[0].startswith(
        "| Attack | Data | Victim | Poison rate | Epsilon | Seed | Lift | ASR | ASR, clean twin |"
    )
    assert lines[2] == (
        "| blto | cat | simclr | 1.00% | 8/255 | 3 | 85.0% [84.0, 86.0] | 91.0% [90.0, 92.0] | 6.0% [5.0, 7.0] "
        "| 2.1% [1.1, 3.1] | 87.4% [86.4, 88.4] | 9,000 | yes |"
    )
    assert "| \u2013 | \u2013 | 6.0%" in lines[3]
    assert lines[4].startswith("| clean | \u2013 | \u2013 | \u2013 | \u2013 | \u2013 |")
    assert lines[-1] == "Probe: linear. In brackets: 95% intervals over the n test images."


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(st.text(), st.sampled_from(["a|b", "[bold]x[/bold]", "[/]", "`", "<b>", "\\|", "![x](http://y)"]))
)
def test_text_never_becomes_markup_or_another_cell(make_record: MakeRecord, text: str) -> None:
    plain, found = markdown_table([make_record()]), markdown_table([make_record(text=text)])
    bare = re.sub(r"\\.", "", found)
    assert bare.count("|") == plain.count("|")
    assert found.count("\n") == plain.count("\n")
    assert not set(bare) & set("<>`*()#!&")
    printed([make_record(text=text)], width=200)


def test_brackets_are_shown_in_the_terminal(make_record: MakeRecord) -> None:
    assert "[bold]x[/bold], simclr" in printed([make_record(text="[bold]x[/bold]")], width=200)


@pytest.mark.parametrize("name", ["noisy_alignment", "poisoned_encoder"])
def test_underscores_inside_names_stay_readable_in_markdown(make_record: MakeRecord, name: str) -> None:
    assert f"| {name} |" in markdown_table([make_record(spec={"attack": {"name": name}})])


def with_seed(make_record: MakeRecord, seed: int, lift: float | None, **spec: object) -> RunRecord:
    base = make_record().spec
    return make_record(f"r{seed}", lift=lift, spec={**base, **spec, "seed": seed})


def test_runs_that_differ_in_their_seed_alone_get_a_row_of_means(make_record: MakeRecord) -> None:
    """Lifts of 0.5, 0.6 and 0.9: mean 2/3, t(0.975, 2) = 4.302653 times 0.2081666 / sqrt(3) is 0.517115."""
    runs = [with_seed(make_record, seed, lift) for seed, lift in ((0, 0.5), (1, 0.6), (2, 0.9))]
    other = with_seed(make_record, 0, 0.1, attacker_share=0.5)
    (row,) = rows_over_seeds([*runs, runs[1], other])
    lift = row.metrics["lift"]
    assert (lift.value, lift.low, lift.high) == pytest.approx((2 / 3, 2 / 3 - 0.517115, 2 / 3 + 0.517115), abs=1e-5)
    assert (lift.n, row.n, row.seed, row.took) == (3, "3 seeds", "mean of 3", "3 of 3")
    (beside,) = rows_over_seeds(runs, "knn")
    assert beside.took == "\u2013"
    table = markdown_table([*runs, other])
    line = table.splitlines()[6]
    assert line.startswith("| blto | cat | simclr | 1.00% | 8/255 | mean of 3 | 66.7% [15.0, 118.4] |")
    assert line.endswith("| 3 seeds | 3 of 3 |")
    assert table.endswith("Means over seeds: Student-t intervals over the seeds.\n")
    text = printed([*runs, other])
    assert max(map(len, text.splitlines())) <= 80
    assert "mean of 3 seeds" in text
    assert "3 of 3 took" in " ".join(text.split())


def test_seeds_with_a_missing_value_have_no_mean_of_it(make_record: MakeRecord) -> None:
    (row,) = rows_over_seeds([with_seed(make_record, 0, 0.5), with_seed(make_record, 1, None)])
    assert "lift" not in row.metrics
    assert row.metrics["asr_clean_twin"].value == pytest.approx(0.06)
    assert row.took == "1 of 2"


def test_runs_of_one_seed_each_have_no_row_of_means(make_record: MakeRecord) -> None:
    runs = [with_seed(make_record, 0, 0.5), with_seed(make_record, 1, 0.6, attacker_share=0.1)]
    assert rows_over_seeds(runs) == rows_over_seeds([runs[0], runs[0]]) == []
    assert "over seeds" not in printed(runs) + markdown_table(runs)
