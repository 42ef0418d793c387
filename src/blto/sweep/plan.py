"""From a sweep's file to its cells, every one of them validated before anything starts.

base: ../cifar10.yaml          # a configuration, or the same written out
cells:                         # named cells, in the order in which they shall run ...
  - name: untrained
    set: {attack: {name: untrained_generator, target_class: 9}}
grid:                          # ... then all combinations of these values
  attack.poison_rate: [0.005, 0.01]
  attack.epsilon: [8/255, 16/255]
seeds: [0, 1, 2]               # each cell once a seed: all cells with the first seed, then all with the next
expected_hours: 1.5            # of a cell; for --max-hours, until a cell is done
comparison: {first: blto, second: ctrl}  # of two cells over their common seeds; read once all of them are done
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from blto.configuration import Configuration
from blto.errors import ConfigError
from blto.experiment import ExperimentSpec
from blto.files import show
from blto.files.yaml import assign, load_yaml, place, with_position
from blto.registry import validate
from blto.sweep.comparison import ComparisonSpec, paired_seeds

MAX_CELLS = 10_000


class CellEntry(BaseModel):
    """One entry of `cells`.

    Attributes:
        name: in tables and file names.
        set: dotted key -> value, over the base; a cell that sets `seed` runs with that one alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.=-]{0,79}$")]
    set: dict[str, Any] = {}


class SweepFile(BaseModel):
    """What a sweep's file holds; see the module.

    Attributes:
        name: the folder of its results; the file's own name without it.
        base: path of a configuration, relative to this file, or the configuration itself. Its `controls` play no part.
        grid: dotted key -> values.
        cells: see CellEntry.
        seeds: without them, the base's.
        expected_hours: how long a cell is expected to take.
        comparison: of two cells, declared before they run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}$")] | None = None
    base: Any
    grid: dict[str, list[Any]] | None = None
    cells: list[dict[str, Any]] | None = None
    seeds: list[Annotated[int, Field(ge=0, lt=2**63, strict=True)]] = []
    expected_hours: Annotated[float, Field(gt=0)] | None = None
    comparison: ComparisonSpec | None = None


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep.

    Attributes:
        name: given, or made from its place in the grid.
        spec: validated.
    """

    name: str
    spec: ExperimentSpec

    @property
    def id(self) -> str:
        """The name of its result: another spec is another cell, and two cells never share one."""
        return f"{self.name}-s{self.spec.seed}-{self.spec.run_id[-10:]}"


@dataclass(frozen=True)
class Sweep:
    """A sweep's cells, in order, at least one, and the comparison that it is for, if it is for one."""

    name: str
    cells: Sequence[Cell]
    expected_hours: float | None = None
    comparison: ComparisonSpec | None = None
    pairs: Sequence[int] = ()
    """The seeds of the comparison."""


@dataclass(frozen=True)
class _Draft:
    """A cell before its spec is known: what it sets, and where in the file each of that stands."""

    name: str
    where: str
    values: Mapping[str, Any]
    places: Mapping[str, str]


def read_sweep(file: Path) -> Sweep:
    """Read and check a sweep's file.

    Raises:
        ConfigError: with file and line: an unknown key, nothing to run, a cell whose configuration is wrong, two cells
            of one name, or of one resolved spec (both are named), a comparison without a pair.
    """
    content = load_yaml(file)
    try:
        given = validate(SweepFile, content, "")
        drafts = [*_named(given.cells), *_combinations(given.grid)]
        if not drafts and not given.seeds:
            raise ConfigError("grid: there is nothing to run; give grid, cells or seeds.")
        drafts = drafts or [_Draft("base", "seeds", {}, {})]
    except ConfigError as error:
        raise with_position(error, file) from error
    base, base_file = _base(given.base, file)
    cells: list[Cell] = []
    known: dict[str, tuple[Cell, _Draft]] = {}
    for draft, seed in _with_seeds(drafts, given.seeds):
        cell = Cell(draft.name, _spec(draft, seed, base, base_file, file))
        twin, twins_draft = known.setdefault(cell.spec.run_id, (cell, draft))
        if twin is not cell:
            raise ConfigError(
                f"{place(file, draft.where)}: cell {show(cell.name)} (seed {cell.spec.seed}) is the same experiment as "
                f"cell {show(twin.name)} ({place(file, twins_draft.where)}); remove one or set something that differs."
            )
        cells.append(cell)
    pairs: list[int] = []
    if given.comparison is not None:
        try:
            pairs = paired_seeds(given.comparison, ((cell.name, cell.spec.seed, cell.spec.probes) for cell in cells))
        except ConfigError as error:
            raise with_position(error, file) from error
    return Sweep(given.name or _slug(file.stem), cells, given.expected_hours, given.comparison, pairs)


def _base(given: Any, file: Path) -> tuple[dict[str, Any], Path | None]:
    """The base configuration, and its own file where it has one."""
    if isinstance(given, Mapping):
        base, path = dict(given), None
    elif isinstance(given, str):
        path = file.parent / given
        try:
            base = load_yaml(path)
        except ConfigError as error:
            raise error if path.is_file() else ConfigError(f"{place(file, 'base')}: base: {error}") from error
    else:
        raise ConfigError(
            f"{place(file, 'base')}: base: {show(given)} is neither a configuration's path nor a configuration."
        )
    base.pop("controls", None)
    return base, path


def _named(entries: list[dict[str, Any]] | None) -> list[_Draft]:
    """The cells that are written out."""
    drafts: list[_Draft] = []
    if entries is not None and not entries:
        raise ConfigError("cells: is empty; list cells, or leave it out.")
    for i, entry in enumerate(entries or []):
        cell = validate(CellEntry, entry, f"cells.{i}")
        if cell.name in {draft.name for draft in drafts}:
            raise ConfigError(f"cells.{i}.name: {cell.name} is the name of an earlier cell; give another one.")
        places = {key: f"cells.{i}.set.{key}" for key in cell.set}
        drafts.append(_Draft(cell.name, f"cells.{i}", cell.set, places))
    return drafts


def _combinations(grid: dict[str, list[Any]] | None) -> list[_Draft]:
    """The cells of the grid: the last key varies fastest."""
    if grid is None:
        return []
    if not grid:
        raise ConfigError("grid: is empty; give `key: [values]`, or leave it out.")
    for key, values in grid.items():
        if not values:
            raise ConfigError(f"grid.{key}: has no values, so the grid is empty; give at least one.")
    count = math.prod(len(values) for values in grid.values())
    if count > MAX_CELLS:
        raise ConfigError(f"grid: has {count} combinations; give at most {MAX_CELLS}.")
    last = Counter(key.rpartition(".")[2] for key in grid)
    short = {key: key if last[part] > 1 else part for key in grid for part in [key.rpartition(".")[2]]}
    labels = {key: _labels(values) for key, values in grid.items()}
    drafts = []
    for indices in itertools.product(*(range(len(values)) for values in grid.values())):
        chosen = dict(zip(grid, indices, strict=True))
        name = "-".join(f"{short[key]}={labels[key][i]}" for key, i in chosen.items())
        places = {key: f"grid.{key}.{i}" for key, i in chosen.items()}
        setting = {key: grid[key][i] for key, i in chosen.items()}
        drafts.append(_Draft(_slug(name), next(reversed(places.values())), setting, places))
    return drafts


def _labels(values: Sequence[Any]) -> list[str]:
    """A short text for each value of one key; different values have different ones."""
    texts = []
    for value in values:
        named = value.get("name") if isinstance(value, Mapping) else value
        texts.append(f"{named:.4g}" if isinstance(named, float) else str(named))
    several = Counter(texts)
    return [f"{text}.{i}" if several[text] > 1 else text for i, text in enumerate(texts)]


def _slug(text: str) -> str:
    """The same as a file's name may be."""
    return re.sub(r"[^A-Za-z0-9_.=-]", "_", text).lstrip(".=-")[:120] or "cell"


def _with_seeds(drafts: Sequence[_Draft], seeds: Sequence[int]) -> list[tuple[_Draft, int | None]]:
    """Every cell with every seed, the seeds outermost; one that sets its own seed once, where it stands."""
    first, *others = list[int | None](seeds) or [None]
    pairs = [(draft, None if "seed" in draft.values else first) for draft in drafts]
    return pairs + [(draft, seed) for seed in others for draft in drafts if "seed" not in draft.values]


def _spec(
    draft: _Draft, seed: int | None, base: Mapping[str, Any], base_file: Path | None, file: Path
) -> ExperimentSpec:
    """The cell's spec. Raises ConfigError with the line that is to blame."""
    given = dict(base)
    for key, value in draft.values.items():
        try:
            if not all(key.split(".")):
                raise ConfigError(f"{show(key)}: give keys with single dots between them (attack.poison_rate).")
            given = assign(given, key.split("."), value, said=show(key))
        except ConfigError as error:
            raise ConfigError(f"{place(file, draft.places[key])}: cell {show(draft.name)}: {error}") from error
    if seed is not None:
        given["seed"] = seed
    try:
        if "controls" in given:
            raise ConfigError("controls: a cell is one experiment; write further attacks as cells of their own.")
        return validate(Configuration, given, "").specs()[0]
    except ConfigError as error:
        key = str(error).partition(": ")[0]
        for name, where in draft.places.items():
            if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
                raise ConfigError(f"{place(file, where)}: cell {show(draft.name)}: {error}", code=error.code) from error
        at = place(base_file, key) if base_file else place(file, f"base.{key}")
        cell = f" (in cell {show(draft.name)})" if draft.values else ""  # which may be why it does not fit
        raise ConfigError(f"{at}: {str(error).rstrip('.')}{cell}.", code=error.code) from error
