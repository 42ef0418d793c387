"""Progress on the terminal: a rich bar where someone is looking, plain lines in a log, silence where asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]
"""Called with the number of steps done so far and a short note ("loss 4.31")."""

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Where progress goes: standard error, so that standard output keeps to results.

    Args:
        quiet: say nothing at all.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, message: str) -> None:
        """One line."""
        if not self.quiet:
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Follow one task of `total` steps; a bar on a terminal, else a line every 30 seconds."""
        if self.quiet:
            yield lambda done, note: None
        elif sys.stderr.isatty():
            with self._rich_bar(title, total) as advance:
                yield advance
        else:
            yield self._lines(title, total)

    @contextmanager
    def _rich_bar(self, title: str, total: int) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda done, note: progress.update(task, completed=done, note=note)

    def _lines(self, title: str, total: int) -> Advance:
        last = time.monotonic()

        def advance(done: int, note: str) -> None:
            nonlocal last
            if done >= total or time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.say(f"{title}: {done}/{total} {note}".rstrip())

        return advance


class Told(Progress):
    """Progress for someone else to show: the newest line, at most one every `seconds`.

    Args:
        tell: takes the line.
        seconds: between two lines; the first of every task is never left out.
    """

    def __init__(self, tell: Callable[[str], None], *, seconds: float = 0.5) -> None:
        super().__init__()
        self._tell, self._seconds = tell, seconds

    def say(self, message: str) -> None:
        """One line."""
        self._tell(message)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Follow one task of `total` steps."""
        last = time.monotonic()

        def advance(done: int, note: str) -> None:
            nonlocal last
            if time.monotonic() - last >= self._seconds:
                last = time.monotonic()
                self._tell(f"{title}: {done}/{total} {note}".rstrip())

        self._tell(f"{title}: 0/{total}")
        yield advance


SILENT, ON_STANDARD_ERROR = Progress(quiet=True), Progress()
