"""What a sweep is doing, on standard error: a live table on a terminal, plain lines in a log, nothing where quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from blto.files.text import show
from blto.runtime.progress import SECONDS_BETWEEN_LINES
from blto.sweep.queue import CellState, SweepQueue


class SweepView:
    """Follows a sweep (`queue.View`).

    Args:
        workers: how many cells run at once; the expected end is computed with it.
        quiet: show nothing.
    """

    def __init__(self, *, workers: int = 1, quiet: bool = False) -> None:
        self._workers, self._quiet = workers, quiet
        self._queue: SweepQueue | None = None
        self._live: Live | None = None
        self._began = time.monotonic()
        self._said: dict[str, float] = {}

    @contextmanager
    def showing(self, queue: SweepQueue) -> Iterator[None]:
        """Show the queue while the block runs."""
        self._queue, self._began = queue, time.monotonic()
        if self._quiet or not sys.stderr.isatty():
            yield
            return
        with Live(get_renderable=self._render, console=Console(stderr=True), refresh_per_second=2) as self._live:
            yield
        self._live = None

    def changed(self, cell: CellState) -> None:
        """A cell has begun or ended: in a log, one line."""
        if cell.status == "running":
            self._say(f"{show(cell.cell.id)}: begins ({self._summary()})")
            self._said[cell.cell.id] = time.monotonic()
            return
        status, seconds = cell.status, cell.result.seconds if cell.result else 0.0
        if status == "failed" and cell.result:
            status_text = f"failed: error[{cell.result.code}]: {show(cell.result.error, 300)}"
        else:
            is_stopped = cell.result is not None and cell.result.status == "stopped"
            waits = "stopped, goes on with the next call" if is_stopped else "could not run, waits for the next call"
            status_text = waits if status == "waiting" else status
        self._say(f"{show(cell.cell.id)}: {status_text} after {_duration(seconds)} ({self._summary()})")

    def told(self, cell: CellState, text: str) -> None:
        """In a log, a line now and then."""
        if time.monotonic() - self._said.get(cell.cell.id, 0.0) > SECONDS_BETWEEN_LINES:
            self._said[cell.cell.id] = time.monotonic()
            self._say(f"{show(cell.cell.id)}: {show(text)}")

    def _say(self, line: str) -> None:
        if not self._quiet and self._live is None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def _summary(self) -> str:
        """Counts, elapsed time and expected end."""
        if self._queue is None:
            return ""
        counts = ", ".join(
            f"{len(self._queue.of(status))} {status}" for status in ("done", "running", "failed", "waiting")
        )
        return f"{counts}; elapsed {_duration(time.monotonic() - self._began)}, expected end {self._expected_end()}"

    def _expected_end(self) -> str:
        """When the last cell will be done, by the clock; with --max-hours at the latest when these are over."""
        assert self._queue is not None
        now, left = time.monotonic(), 0.0
        for cell in (*self._queue.of("waiting"), *self._queue.of("running")):
            expected = self._queue.expected_seconds(cell)
            if expected is None:
                return "unknown"
            left += max(expected - (now - cell.began if cell.status == "running" else 0.0), 0.0)
        left /= self._workers
        if self._queue.deadline is not None:
            left = min(left, max(self._queue.deadline - now, 0.0))
        return (datetime.now() + timedelta(seconds=left)).strftime("%a %H:%M")

    def _render(self) -> RenderableType:
        rows = Table("CELL", "FOR", "NOW", box=None, pad_edge=False, header_style="bold")
        for cell in self._queue.of("running") if self._queue else []:
            spent = _duration(time.monotonic() - cell.began)
            rows.add_row(Text(show(cell.cell.id, 80)), spent, Text(show(cell.doing, 120)))
        return Group(Text(f"Sweep: {self._summary()}"), rows)


def _duration(seconds: float) -> str:
    """Whole seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
