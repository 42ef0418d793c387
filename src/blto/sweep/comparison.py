"""A comparison that a sweep's file declares before anything runs: "does A beat B?", over paired seeds, read once.

    comparison: {first: blto, second: ctrl, metric: lift, probe: linear}

Its difference and its test are computed only when all of its cells are done. A test that is looked at after every seed
and believed as soon as it says yes finds differences where there are none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from blto.errors import ConfigError
from blto.evaluation import METRIC_NAMES, PROBES, aggregate, sign_flip_test
from blto.evaluation.statistics import MAX_SIGN_FLIPS
from blto.files import show
from blto.records import HEADLINE_PROBE, Metric
from blto.sweep.results import CellResult

LEVEL = 0.05
"""A comparison is established where the p-value is below it, which takes at least 6 pairs."""


class ComparisonSpec(BaseModel):
    """What is compared.

    Attributes:
        first, second: names of cells; every seed that both have is a pair.
        metric: of `metrics.METRIC_NAMES`.
        probe: whose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: str
    second: str
    metric: str = "lift"
    probe: str = HEADLINE_PROBE


@dataclass(frozen=True)
class Comparison:
    """A declared comparison, and what came of it.

    Attributes:
        spec: as declared.
        seeds: of the pairs.
        waiting: those of them of which a cell is not done, failed ones included.
        failed: those of them of which a cell has failed.
        differences: first minus second, a number a pair; empty while one waits.
        mean: of them, with Student's t interval over the seeds; None while a pair waits.
        p: of the exact two-sided sign-flip test; None while a pair waits.
    """

    spec: ComparisonSpec
    seeds: Sequence[int]
    waiting: Sequence[int]
    failed: Sequence[int] = ()
    differences: Sequence[float] = ()
    mean: Metric | None = None
    p: float | None = None

    @property
    def established(self) -> bool:
        """Whether the first is higher than the second by more than chance, by the declared test."""
        higher = self.mean is not None and self.mean.value is not None and self.mean.value > 0
        return higher and self.p is not None and self.p < LEVEL

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            **self.spec.model_dump(),
            "seeds": list(self.seeds),
            "waiting": list(self.waiting),
            "failed": list(self.failed),
            "differences": list(self.differences),
            "mean": None if self.mean is None else self.mean.model_dump(),
            "p": self.p,
            "established": self.established,
        }


def paired_seeds(spec: ComparisonSpec, cells: Iterable[tuple[str, int, Collection[str]]]) -> list[int]:
    """The seeds that both cells have, of name, seed and probes of every cell.

    Raises:
        ConfigError: a cell, a metric or a probe that there is not, a cell against itself or of several experiments, or
            no seed in common, or more than the exact test can take.
    """
    seeds: dict[str, list[int]] = {}
    for name, seed, probes in cells:
        seeds.setdefault(name, []).append(seed)
        if name in (spec.first, spec.second) and spec.probe in PROBES and spec.probe not in probes:
            raise ConfigError(
                f"comparison.probe: {spec.probe} is not among the probes of cell {show(name)}; add it there."
            )
    known = {"first": seeds, "second": seeds, "metric": METRIC_NAMES, "probe": PROBES}
    for key, among in known.items():
        given = getattr(spec, key)
        if given not in among:
            raise ConfigError(f"comparison.{key}: {show(given)} is unknown; give one of {', '.join(among)}.")
    common = [seed for seed in seeds[spec.first] if seed in seeds[spec.second]]
    if spec.first == spec.second or not common:
        why = "is the first as well" if spec.first == spec.second else "has no seed in common with the first"
        raise ConfigError(f"comparison.second: cell {show(spec.second)} {why}; give another one.")
    for key in ("first", "second"):
        own = seeds[getattr(spec, key)]
        if len(set(own)) < len(own):
            raise ConfigError(
                f"comparison.{key}: {show(getattr(spec, key))} names several cells of one seed; rename one."
            )
    if len(common) > MAX_SIGN_FLIPS:
        raise ConfigError(
            f"comparison: {len(common)} seeds; the exact test takes at most {MAX_SIGN_FLIPS}, give fewer."
        )
    return common


def compare(
    spec: ComparisonSpec, seeds: Sequence[int], results: Mapping[tuple[str, int], CellResult | None]
) -> Comparison:
    """The comparison as it stands, over `paired_seeds`, from the result of every cell by its name and seed."""
    values: dict[tuple[str, int], float] = {}
    for cell, result in results.items():
        metric = result.metric(spec.metric, spec.probe) if result is not None and result.status == "done" else None
        if metric is not None and metric.value is not None:
            values[cell] = metric.value
    waiting = [seed for seed in seeds if not {(spec.first, seed), (spec.second, seed)} <= values.keys()]
    if waiting:
        pairs = {seed: [results.get((name, seed)) for name in (spec.first, spec.second)] for seed in waiting}
        failed = [seed for seed, pair in pairs.items() if any(each and each.status == "failed" for each in pair)]
        return Comparison(spec, seeds, waiting, failed)
    differences = [values[spec.first, seed] - values[spec.second, seed] for seed in seeds]
    return Comparison(spec, seeds, [], [], differences, aggregate(differences), sign_flip_test(differences))
