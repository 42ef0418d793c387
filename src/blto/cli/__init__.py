"""The command line: `blto COMMAND`. Every command is also a function of the package `blto`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blto.cli.guard import guarded

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` defaults to the process's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _run(given), given)


def _run(arguments: list[str]) -> int | None:
    from typer.main import get_command

    from blto.cli.app import app

    code = get_command(app).main(args=arguments, prog_name="blto", standalone_mode=False)
    return code if isinstance(code, int) else None
