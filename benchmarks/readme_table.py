"""Write the tables of README.md and docs/, and the figures of docs/findings.md, from the committed records.

To run: python -m benchmarks.readme_table
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import class_reach, detectors, filters, findings, landing, repairs, retraining
from blto.files import read_json, read_jsonl, write_text
from blto.records import RunStore
from blto.report.tables import markdown_table

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in (
            *("engine.md", "findings.md"),
            *(f"defenses/{page}.md" for page in ("README", "carried_trigger", "recipe_changes")),
        )
    ),
)
GATES = ("gate1", "gate1_patch_size", "gate4", "gate4_levers", "gate4_controls", "gate4_repeats", "gate5")
FOREIGN_LIMIT = 0.25
"""As in `timing`, which imports torch."""
COLUMNS = (
    *("Batch", "Width", "Pixels", "Images", "Processes x threads"),
    *("Images/s", "CPU s per 1,000", "Anonymous MiB", "Peak MiB"),
)
SUMMARY = {
    "anonymous_memory_most_over_few_images": (
        "Anonymous memory with 10,000,000 images / with 50,000: {:.2f} (at most 1.1)."
    ),
    "two_processes_over_two_threads": (
        "Two single-thread trainings side by side / one with two threads: {:.2f} in images/s."
    ),
}


def results_table(results: Path) -> str:
    """Every run that has no table of its own in docs/."""
    elsewhere = ("gate", "bank", "recipe_changes")
    stores = [each for each in sorted(results.iterdir()) if each.is_dir() and not each.name.startswith(elsewhere)]
    return markdown_table([record for store in stores for record in RunStore(store).list()]).strip()


def speed_table(results: Path) -> str:
    """The ratios of `make bench-engine`, and what `make bench-learning` says of equal learning."""
    engine = read_json(results / "engine.json")
    lines = ["| Comparison | Ours | Other | Ratio (range over rounds) |", "| --- | ---: | ---: | ---: |"]
    lines += [speed_row(part, ratio) for part in engine["parts"] for ratio in part["ratios"]]
    machine = engine["machine"]
    bf16, fp32 = (
        " and ".join(f"{engine[f'matmul_gflops_{when}'][kind]:.0f}" for when in ("before", "after"))
        for kind in ("bf16", "fp32")
    )
    lines += [
        "",
        f"{machine['processor']}, {machine['threads']} threads, {engine['engine']}. Rates in images a second where",
        f"nothing else is said. A 4096^3 matrix product before and after: {bf16} GFLOP/s in bf16, {fp32} in fp32.",
        *learning_lines(results / "equal_learning.json"),
    ]
    return "\n".join(lines)


def learning_lines(file: Path) -> list[str]:
    """What a finished `make bench-learning` says; nothing before that."""
    found = read_json(file).get("difference") if file.exists() else None
    if found is None:
        return []
    return [
        "Equal learning: kNN accuracy of the fast engine minus that of plain torch in fp32 is "
        f"{found['mean']:+.2f} points,",
        f"90% interval [{found['low']:+.2f}, {found['high']:+.2f}], {found['n']} paired seeds (`make bench-learning`).",
    ]


def speed_row(part: dict[str, Any], ratio: dict[str, Any]) -> str:
    """One comparison; "no verdict" where too few rounds were undisturbed."""
    shown = f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if "ratio" in ratio else "no verdict"
    rates = (part["rates"][name] for name in ("ours", ratio["other"]))
    ours, other = ("-" if rate is None else f"{rate:,.0f}" for rate in rates)
    return f"| {part['title']}: ours / {ratio['other']} | {ours} | {other} | {shown} |"


def scaling_table(results: Path) -> str:
    """The cells of `make bench-scaling`, the two ratios that they give, and the cost of each stage."""
    file = results / "scaling.json"
    if not file.exists():
        return "Not measured yet: `make bench-scaling`."
    found = read_json(file)
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join('---:' for _ in COLUMNS)} |",
        *map(scaling_row, sorted(found["cells"].values(), key=axes)),
        "",
        f"{found['machine']['processor']}, {found['machine']['cores']} cores, {found['engine']}. "
        "Memory is summed over processes.",
        *(SUMMARY[name].format(value) for name, value in sorted(found["summary"].items())),
    ]
    if stages := found["parts"].get("stages"):
        lines += ["", "| Stage | Unit | Seconds a unit |", "| --- | --- | ---: |"]
        lines += [f"| {name} | {cost['unit']} | {cost['seconds']:.3g} |" for name, cost in stages["costs"].items()]
    return "\n".join(lines)


def axes(cell: dict[str, Any]) -> tuple[int, ...]:
    """What a row is sorted by: one axis after the other, each from its least value on."""
    return tuple(cell[name] for name in ("processes", "threads", "resolution", "width", "images", "batch_size"))


def scaling_row(cell: dict[str, Any]) -> str:
    """One cell; its speed is a dash where strangers disturbed it, its memory counts all the same."""
    disturbed = cell["foreign"] > FOREIGN_LIMIT
    columns = [
        *(str(cell[name]) for name in ("batch_size", "width", "resolution")),
        f"{cell['images']:,}",
        f"{cell['processes']} x {cell['threads']}",
        "-" if disturbed else f"{cell['images_per_second']:,.0f}",
        "-" if disturbed else f"{cell['cpu_seconds_per_1000_images']:.2f}",
        f"{cell['anonymous_mib']:,.0f}",
        f"{cell['peak_mib']:,.0f}",
    ]
    return f"| {' | '.join(columns)} |"


def accuracy_table(results: Path) -> str:
    """What `make bench-accuracy` found: a row a contender, its accuracy at about every fifth minute."""
    file = results / "accuracy_over_time.json"
    if not file.exists():
        return "Not measured yet: `make bench-accuracy`."
    minutes = (5, 10, 15, 20, 25, 30)
    lines = [
        f"| kNN accuracy on CIFAR-10 test after | {' | '.join(f'{at} min' for at in minutes)} | all |",
        f"| --- | {'---: | ' * (len(minutes) + 1)}".rstrip(),
    ]
    for name, run in read_json(file)["contenders"].items():
        last = run["curve"][-1]
        cells = [shown_near(run["curve"], at) for at in minutes]
        lines.append(f"| {name} | {' | '.join(cells)} | {last['knn_accuracy']:.1f}% in {last['minutes']:.1f} min |")
    return "\n".join(lines)


def shown_near(curve: list[dict[str, float]], minute: float) -> str:
    """The accuracy of the point nearest to a minute; a dash where that is further off than a minute and a half."""
    nearest = min(curve, key=lambda point: abs(point["minutes"] - minute))
    return f"{nearest['knn_accuracy']:.1f}%" if abs(nearest["minutes"] - minute) <= 1.5 else "-"


def recipe_table(results: Path) -> str:
    """The candidates of `benchmarks.recipe_search`, grouped by budget, the best first."""
    file = results / "recipe_search.jsonl"
    if not file.exists():
        return "Not searched yet."
    lines = [
        "| Candidate | Core-minutes | Epochs | Parameters | Held-out kNN accuracy |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for run in sorted(read_jsonl(file), key=lambda run: (run["core_minutes"], -run["knn_accuracy"])):
        lines.append(
            f"| {run['name']} | {run['core_minutes']:g} | {run['epochs']} "
            f"| {run['parameters'] / 1e6:.2f} M | {run['knn_accuracy']:.1f}% |"
        )
    return "\n".join(lines)


def gate_table(gate: str, results: Path) -> str:
    """The cells of one gate of docs/findings.md."""
    return findings.table(results / gate)


TABLES: dict[str, Callable[[Path], str]] = {
    "results": results_table,
    "speed": speed_table,
    "scaling": scaling_table,
    "accuracy": accuracy_table,
    "recipes": recipe_table,
    "gate2": lambda results: findings.checks_table(results / "gate2"),
    "levers": lambda results: findings.levers_table(results / "levers.jsonl"),
    "displacement": lambda results: findings.displacement_table(sorted(results.glob("gate*"))),
    "trend": lambda results: findings.trend_table(sorted(results.glob("gate*"))),
    "gate5_seeds": lambda results: findings.seeds_table(results / "gate5"),
    "bank": lambda results: findings.seeds_table(results / "bank_poisoned"),
    "bank_fresh": partial(gate_table, "bank_fresh"),
    "bank_classes": partial(gate_table, "bank_classes"),
    "class_reach": class_reach.class_reach_table,
    "landing": landing.landing_table,
    "recipe_changes": partial(gate_table, "recipe_changes"),
    "detectors": detectors.detector_table,
    "detectors_by_class": detectors.by_class_table,
    "defenses": detectors.status_table,
    "filters": filters.filter_table,
    "carried_trigger": filters.carried_trigger_table,
    "retraining": retraining.retraining_table,
    "repairs": repairs.repair_table,
    "draws": lambda results: findings.draws_table(results / "probe_draws.jsonl"),
    **{gate: partial(gate_table, gate) for gate in GATES},
}


def with_tables(page: str, results: Path) -> str:
    """A page's text with each table between its two marks, where it has them."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}{table(results)}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    findings.draw(ROOT / "benchmarks" / "results")
    for file in PAGES:
        write_text(file, with_tables(file.read_text(), ROOT / "benchmarks" / "results"))
