"""The command line: `blto COMMAND`. Every command is also a function of the package `blto`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from blto.cli.guard import guarded

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` defaults to the process's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(given), given, crash_folder=_store(given))


def _run(arguments: list[str]) -> int | None:
    from typer.main import get_command

    from blto.cli.app import app

    code = get_command(app).main(args=arguments, prog_name="blto", standalone_mode=False)
    return code if isinstance(code, int) else None


def _store(arguments: list[str]) -> Path:
    """Where a crash file goes: the `--store` that was given, as far as that can be told before parsing."""
    for option, value in pairwise([*arguments, ""]):
        if option == "--store" and value:
            return Path(value)
        if option.startswith("--store="):
            return Path(option.removeprefix("--store="))
    return Path("runs")
