"""Where and how a command runs, as every call of `blto.api` takes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict, Unpack

from blto.experiment import Environment
from blto.records import RunStore
from blto.runtime.device import resolve_device
from blto.runtime.progress import Progress

AnyPath = str | os.PathLike[str]


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
