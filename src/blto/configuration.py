"""From a YAML file, `--set` and `--seed` to validated specs, an error saying which of them is to blame; and from the
options of a command to where it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from pydantic import BeforeValidator, Field

from blto.errors import ConfigError
from blto.experiment import Environment, ExperimentSpec
from blto.files import show
from blto.files.yaml import apply_assignments, load_yaml, parse_assignment, with_position
from blto.pretraining.spec import Engine
from blto.records import RunStore
from blto.registry import validate
from blto.runtime.device import resolve_device
from blto.runtime.progress import Progress

AnyPath = str | os.PathLike[str]
Config = AnyPath | Mapping[str, Any]


def _list(given: Any) -> Any:
    if given is not None and not isinstance(given, list):
        raise ValueError(f"{show(given)} is not a list; give names of attacks, such as [clean]")
    return given or []


class Configuration(ExperimentSpec):
    """What a configuration file holds.

    Attributes:
        controls: further attacks, by name or as mappings, each run beside the first; see `ExperimentSpec.with_control`.
    """

    controls: Annotated[list[Any], BeforeValidator(_list)] = Field(default_factory=list)

    def specs(self) -> list[ExperimentSpec]:
        """The experiment itself, then one for each control. Raises ConfigError with the control's key."""
        spec = ExperimentSpec.parse(self.model_dump(mode="json", exclude={"controls"}))
        return [spec, *(spec.with_control(each, f"controls.{i}") for i, each in enumerate(self.controls))]


def read_specs(
    config: Config, assignments: Sequence[str], seed: int | None, engine: Engine | None = None, **absent: Any
) -> list[ExperimentSpec]:
    """The validated specs of a configuration: the experiment's, then those of its controls.

    Args:
        config: path of a YAML file, or its content.
        assignments: "a.b=c", applied in order.
        seed: overrules the configuration's, where given.
        engine: overrules the configuration's and its surrogate's, where given.
        absent: keys to fill in where the configuration lacks them.

    Raises:
        ConfigError: with the key, and the file and line of `config`, the `--set` or the `--seed` that caused it.
    """
    file = None if isinstance(config, Mapping) else Path(config)
    read = dict(config) if isinstance(config, Mapping) else load_yaml(Path(config))
    given = {**absent, **apply_assignments(read, assignments)}
    if seed is not None:
        given["seed"] = seed
    try:
        specs = validate(Configuration, given, "").specs()
    except ConfigError as error:
        key = str(error).partition(": ")[0]
        if key == "seed" and seed is not None:
            raise ConfigError(f"--seed: {str(error).partition(': ')[2]}", code=error.code) from error
        assigned = (".".join(parse_assignment(text)[0]) for text in assignments)
        if any(f"{key}.".startswith(f"{name}.") for name in assigned):
            raise ConfigError(f"--set {error}", code=error.code) from error
        raise (with_position(error, file) if file else error) from error
    return specs if engine is None else [spec.with_engine(engine) for spec in specs]


def read_spec(
    config: Config, assignments: Sequence[str], seed: int | None, engine: Engine | None = None, **absent: Any
) -> ExperimentSpec:
    """The experiment's spec alone; arguments and errors as in `read_specs`."""
    return read_specs(config, assignments, seed, engine, **absent)[0]


class Options(TypedDict, total=False):
    """Where and how a call runs; apart from the device's arithmetic no result depends on it.

    Attributes:
        store: folder of the runs and of what they share; "runs" by default.
        data_root: folder of the data sets; else the environment variable BLTO_DATA.
        device: "auto", "cpu" or "cuda".
        resume: go on from the last checkpoint of a stage that was interrupted.
        quiet: no progress on standard error.
    """

    store: AnyPath
    data_root: AnyPath | None
    device: str
    resume: bool
    quiet: bool


def environment(**options: Unpack[Options]) -> Environment:
    """The options as the experiment takes them. Raises ConfigError for a device that is not here."""
    data_root = options.get("data_root") or os.environ.get("BLTO_DATA")
    return Environment(
        store=RunStore(Path(options.get("store", "runs"))),
        data_root=Path(data_root) if data_root else None,
        device=resolve_device(options.get("device", "auto")),
        resume=options.get("resume", False),
        progress=Progress(quiet=options.get("quiet", False)),
    )
