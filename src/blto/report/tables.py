"""One table of results, three renderings: terminal, Markdown, and the rows that the HTML report lays out.

A row a run; then, for each experiment that was run with several seeds, a row of means over them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from blto.files.atomic import canonical_json
from blto.files.text import show
from blto.records import HEADLINE_PROBE, Metric, RunRecord
from blto.report.wording import MISSING, interval, is_attack, lookup, percent, with_interval

METRICS = {
    "lift": "Lift",
    "asr": "ASR",
    "asr_clean_twin": "ASR, clean twin",
    "untriggered_rate": "Untriggered rate",
    "clean_accuracy": "Clean accuracy",
}


@dataclass(frozen=True)
class Row:
    """One run in a table, or the mean of `seeds` of them; texts are safe to show, numbers are fractions.

    `took` is said of the headline probe only.
    """

    attack: str
    data: str
    method: str
    poison_rate: float | None
    epsilon: str
    seed: str
    took: str
    metrics: Mapping[str, Metric]
    seeds: int = 1

    @property
    def n(self) -> str:
        """Number of images behind the ASR, or of seeds behind a mean."""
        if self.seeds > 1:
            return f"{self.seeds} seeds"
        return f"{self.metrics['asr'].n:,}" if "asr" in self.metrics else MISSING

    @property
    def which(self) -> str:
        """The seed, in words."""
        return f"seed {self.seed}" if self.seeds == 1 else f"{self.seed} seeds"


def table_rows(records: Sequence[RunRecord], probe: str = HEADLINE_PROBE) -> list[Row]:
    """One row per record, in the given order; a run without this probe has an empty row rather than none."""
    rows = []
    for record in records:
        rate = lookup(record.spec, "attack.poison_rate")
        rows.append(
            Row(
                attack=_name(record, "attack.name"),
                data=_data(record),
                method=_name(record, "pretraining.method.name"),
                poison_rate=float(rate) if isinstance(rate, int | float) and is_attack(record) else None,
                epsilon=_epsilon(record),
                seed=_name(record, "seed"),
                took=("yes" if record.took else "no") if is_attack(record) and probe == HEADLINE_PROBE else MISSING,
                metrics=record.metrics.get(probe, {}),
            )
        )
    return rows


def rows_over_seeds(records: Sequence[RunRecord], probe: str = HEADLINE_PROBE) -> list[Row]:
    """A row for each spec that stands there with two seeds or more: means, with Student-t intervals over the seeds."""
    groups: dict[bytes, dict[Any, RunRecord]] = {}
    for record in records:
        spec = {key: value for key, value in record.spec.items() if key != "seed"}
        groups.setdefault(canonical_json(spec), {})[record.spec.get("seed")] = record
    rows = []
    for group in groups.values():
        if len(group) > 1:
            runs = list(group.values())
            first, *_ = each = table_rows(runs, probe)
            said = first.took != MISSING
            rows.append(
                replace(
                    first,
                    seed=f"mean of {len(runs)}",
                    epsilon=first.epsilon if len({row.epsilon for row in each}) == 1 else "none",
                    took=f"{sum(run.took for run in runs)} of {len(runs)}" if said else MISSING,
                    metrics=_means([row.metrics for row in each]),
                    seeds=len(runs),
                )
            )
    return rows


def _means(runs: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Each metric's mean over the runs; of one that a run lacks there is none."""
    from blto.evaluation.metrics import aggregate  # with it comes torch, which a table of single runs can do without

    values = {name: [run[name].value if name in run else None for run in runs] for name in METRICS}
    return {name: aggregate(each) for name, each in values.items() if None not in each}


def probes(records: Sequence[RunRecord]) -> list[str]:
    """All probes that some record has, the headline first."""
    names = {probe for record in records for probe in record.metrics}
    return sorted(names, key=lambda name: (name != HEADLINE_PROBE, name))


def results_table(records: Sequence[RunRecord], probe: str = HEADLINE_PROBE) -> Table:
    """The results for a terminal of 80 columns or more, the clean twin beside the ASR."""
    rows, means = table_rows(records, probe), rows_over_seeds(records, probe)
    over = "; of means over seeds, Student's t" if means else ""
    title = Text(f"Results, {show(probe, 40)} probe, with 95% intervals{over}")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 1, 0), pad_edge=False)
    table.add_column("Attack", min_width=max((len(row.attack) for row in rows), default=0))
    for name in METRICS.values():
        table.add_column(name, justify="right", max_width=11)
    for row in (*rows, *means):
        rate = "" if row.poison_rate is None else f"{percent(row.poison_rate, 2)} poison\n"
        budget = "" if row.epsilon == MISSING else f"epsilon {row.epsilon}\n"
        setting = f"\n{row.data}, {row.method}\n{rate}{budget}{row.which}"
        # Text, not str: rich would read markup in "[bold]"
        table.add_row(Text(row.attack, style="bold") + Text(setting), *(_cell(row, name) for name in METRICS))
    return table


def _cell(row: Row, name: str) -> Text:
    """Value, interval and n below each other: six columns have to fit in 80 characters."""
    metric = row.metrics.get(name)
    third = f"n {metric.n:,}" if metric else ""
    if row.seeds > 1:
        third = f"{row.seeds} seeds" if metric else ""
    if name == "lift":
        said = {"yes": "took", "no": "not taken", MISSING: ""}
        third = said.get(row.took, f"{row.took} took")
    return Text("\n".join([percent(metric.value if metric else None), interval(metric).replace(" ", ""), third]))


def markdown_table(records: Sequence[RunRecord], probe: str = HEADLINE_PROBE) -> str:
    """The results as a Markdown table, with a line that says what the numbers are."""
    header = ["Attack", "Data", "Victim", "Poison rate", "Epsilon", "Seed", *METRICS.values(), "n", "Took"]
    lines = [header, ["---"] * 6 + ["---:"] * (len(METRICS) + 1) + ["---"]]
    means = rows_over_seeds(records, probe)
    for row in (*table_rows(records, probe), *means):
        names = [_escape_markdown(name) for name in (row.attack, row.data, row.method)]
        values = [with_interval(row.metrics.get(name)) for name in METRICS]
        lines.append(
            [*names, percent(row.poison_rate, 2), row.epsilon, _escape_markdown(row.seed), *values, row.n, row.took]
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    over = " Means over seeds: Student-t intervals over the seeds." if means else ""
    shown = _escape_markdown(show(probe, 40))
    return f"{table}\n\nProbe: {shown}. In brackets: 95% intervals over the n test images.{over}\n"


def _data(record: RunRecord) -> str:
    """The data set, and whether held-out training images stood for its test set."""
    held_out = lookup(record.spec, "held_out")
    of = f", {held_out:,} held out" if isinstance(held_out, int) and held_out else ""
    return _name(record, "data.name") + of


def _name(record: RunRecord, path: str) -> str:
    value = lookup(record.spec, path)
    return MISSING if value is None else show(value, 60)


def _epsilon(record: RunRecord) -> str:
    """The budget in 8-bit steps, such as 8/255; of an attack without one, what poisons and test images reached."""
    if not is_attack(record):
        return MISSING
    epsilon = lookup(record.spec, "attack.epsilon")
    if isinstance(epsilon, int | float):
        return f"{255 * epsilon:.3g}/255"
    reached = lookup(record.provenance, "poison.epsilon_reached"), record.stealth.get("linf")
    steps = dict.fromkeys(f"{255 * value:.3g}" for value in reached if isinstance(value, int | float))
    return f"none: {' and '.join(steps)}/255" if steps else MISSING


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*<>|#&$~!\[\]()]|(?<!\w)_|_(?!\w))", r"\\\1", text)
