"""Arguments and options that several commands share, and the keywords that calls get from them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Engine(StrEnum):
    """What trains: the native kernels where they fit, or plain torch throughout."""

    FAST = "fast"
    REFERENCE = "reference"


class Executor(StrEnum):
    """Where a sweep's cells run."""

    SERIAL = "serial"
    PROCESSES = "processes"


class Layout(StrEnum):
    """How a poisoned set is written."""

    PARQUET = "parquet"
    PNG = "png"


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key, as attack.poison_rate=0.005; may be given again."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of every choice; overrules the configuration's.")]
OwnSeed = Annotated[int, typer.Option(min=0, help="Seed of every choice.")]
Store = Annotated[Path, typer.Option(help="Folder of the runs and of what they share.")]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of the data sets; else the variable BLTO_DATA.", show_default=False)
]
EngineOption = Annotated[
    Engine | None,
    typer.Option(help="What trains; sets pretraining.engine and that of the trigger's surrogate.", show_default=False),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted stage.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
PageFile = Annotated[Path | None, typer.Option(help="An HTML page to write.", show_default=False)]
SarifFile = Annotated[Path | None, typer.Option(help="A SARIF file to write.", show_default=False)]
OutFile = Annotated[Path | None, typer.Option(help="Copy the file to here.", show_default=False)]


def surroundings(store: Path, data_root: Path | None, device: Device, resume: bool, quiet: bool) -> dict[str, Any]:
    """The keywords that every call on a configuration takes; see `blto.configuration.Options`."""
    return {
        "store": store,
        "data_root": data_root,
        "device": device.value,
        "resume": resume,
        "quiet": quiet,
    }


def word(engine: Engine | None) -> Any:
    """The engine as every call takes it."""
    return None if engine is None else engine.value


def choices(set_: list[str] | None, seed: int | None, engine: Engine | None) -> dict[str, Any]:
    """The keywords that overrule the configuration in every call that trains."""
    return {"set": set_ or (), "seed": seed, "engine": word(engine)}
