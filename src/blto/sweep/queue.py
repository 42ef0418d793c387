"""Which cell runs next, what is kept of each that ends, and when enough is enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from blto.errors import BltoError, Busy, ConfigError, ResourceExhausted
from blto.files import show, write_text
from blto.runtime.jobs import Failure, Job, Outcome
from blto.sweep.plan import Cell, Sweep
from blto.sweep.results import CellResult, Results

HOUR = 3600.0
SLACK = 0.01
"""Of a cell: an expected time is no more exact than this, and a call takes a moment before it begins the first one."""
LEAST_SHARE = 0.1
"""Of a cell's expected time, what a stopped cell is expected to need at least when it goes on."""
Status = Literal["waiting", "running", "done", "failed"]


class View(Protocol):
    """Follows a sweep."""

    def changed(self, cell: CellState) -> None:
        """A cell has begun or ended."""

    def told(self, cell: CellState, text: str) -> None:
        """What a running cell does."""


@dataclass
class CellState:
    """A cell and how it stands.

    Attributes:
        status: of this cell; one that was stopped is waiting.
        result: the newest that there is.
        began: moment of `time.monotonic`, while it runs.
        doing: the newest of its progress.
    """

    cell: Cell
    status: Status = "waiting"
    result: CellResult | None = None
    began: float = 0.0
    doing: str = ""

    @property
    def spent(self) -> float:
        """Seconds spent on it before this call."""
        return self.result.seconds if self.result and self.result.status == "stopped" else 0.0


@dataclass
class SweepQueue:
    """The cells of a sweep as a queue for an executor (`runtime.jobs.Queue`).

    Args:
        sweep: the cells, in the order in which they are begun.
        results: where their results are.
        content: of a job, for a cell.
        max_hours: no cell is begun that is not expected to end by then, and what runs then is stopped; None: no end.
        expected_hours: of a cell, until one of this sweep is done; the file's own where this is None.
        retry_failed: take failed cells as waiting ones.
        view: follows.

    Attributes:
        stopped_by: the signal that ended the sweep, if one did.
        halted: why no further cell is begun, where that is an error that the next cell would meet as well.
        busy: the last cell's error that found something in use by another process; such a cell keeps waiting.
    """

    sweep: Sweep
    results: Results
    content: Callable[[Cell], Mapping[str, Any]]
    view: View
    max_hours: float | None = None
    expected_hours: float | None = None
    retry_failed: bool = False
    states: dict[str, CellState] = field(init=False)
    deadline: float | None = field(init=False, default=None)
    stopped_by: int | None = field(init=False, default=None)
    halted: BltoError | None = field(init=False, default=None)
    busy: BltoError | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.states = {cell.id: self._found(cell) for cell in self.sweep.cells}
        self._tried: set[str] = set()
        if self.max_hours is not None:
            self.deadline = time.monotonic() + self.max_hours * HOUR

    def _found(self, cell: Cell) -> CellState:
        """A cell as earlier calls have left it."""
        result = self.results.load(cell.id)
        if result is None or result.status == "stopped" or (result.status == "failed" and self.retry_failed):
            return CellState(cell, result=result)
        return CellState(cell, status=result.status, result=result)

    def of(self, status: Status) -> list[CellState]:
        """The cells that stand so, in order."""
        return [state for state in self.states.values() if state.status == status]

    def expected_seconds(self, state: CellState | None = None) -> float | None:
        """How long a cell will take, without what was spent on it: the mean of the done ones, else as was given."""
        known = [each.result.seconds for each in self.of("done") if each.result and not each.result.reused]
        hours = self.sweep.expected_hours if self.expected_hours is None else self.expected_hours
        if not known and hours is None:
            return None
        whole = sum(known) / len(known) if known else HOUR * (hours or 0.0)
        return max(whole - (state.spent if state else 0.0), LEAST_SHARE * whole)

    def check_time(self) -> None:
        """Raises ConfigError where `max_hours` is too short for the cell that would be the first, or none can tell."""
        waiting = self.of("waiting")
        if self.max_hours is None or not waiting:
            return
        expected = self.expected_seconds(waiting[0])
        if expected is None:
            raise ConfigError(
                f"--max-hours {self.max_hours:g}: nothing says yet how long a cell takes; add `expected_hours:` to the "
                "sweep's file, or give --expected-hours."
            )
        if expected > self.max_hours * HOUR:
            raise ConfigError(
                f"--max-hours is {self.max_hours:g}, but cell {show(waiting[0].cell.id)} is expected to take "
                f"{math.ceil(1000 * expected / HOUR) / 1000:g} hours; give at least that, or a better --expected-hours."
            )

    def next(self) -> Job | None:
        """The first waiting cell that has not been tried in this call, if it is expected to end in time."""
        state = next((each for each in self.of("waiting") if each.cell.id not in self._tried), None)
        if state is None or self.halted is not None or self.stopped_by is not None:
            return None
        if self.deadline is not None:
            expected = self.expected_seconds(state)
            if expected is None or time.monotonic() + (1 - SLACK) * expected > self.deadline:
                return None
        self._tried.add(state.cell.id)
        state.status, state.began, state.doing = "running", time.monotonic(), ""
        self.view.changed(state)
        return Job(state.cell.id, dict(self.content(state.cell)), self.deadline)

    def told(self, name: str, text: str) -> None:
        """Pass a cell's progress on."""
        self.states[name].doing = text
        self.view.told(self.states[name], text)

    def ended(self, name: str, outcome: Outcome) -> None:
        """Keep a cell's result. Raises ResourceExhausted where that cannot be written; the cell is then run again."""
        state = self.states[name]
        state.status = "waiting"
        if outcome.stopped:
            if outcome.signal_number is not None:
                self.stopped_by = outcome.signal_number
            self._keep(state, outcome, status="stopped")
        elif outcome.failure is None:
            self._keep(state, outcome, status="done", **outcome.value)
            state.status = "done"
        elif outcome.failure.exit_code == Busy.exit_code:
            self.busy = _as_error(outcome.failure)
        elif outcome.failure.code in {"DISK-FULL", "NOT-WRITABLE"}:
            self.halted = _as_error(outcome.failure)
        else:
            failure = self._with_trace(name, outcome.failure)
            facts = {"code": failure.code, "error": failure.message, "exit_code": failure.exit_code}
            self._keep(state, outcome, status="failed", **facts)
            state.status = "failed"
        self.view.changed(state)

    def _keep(self, state: CellState, outcome: Outcome, **facts: Any) -> None:
        cell, seconds = state.cell, state.spent + outcome.seconds
        result = CellResult.model_validate({"cell": cell.id, "run_id": cell.spec.run_id, "seconds": seconds, **facts})
        self.results.save(result)
        state.result = result

    def _with_trace(self, name: str, failure: Failure) -> Failure:
        """A bug's traceback goes to a file beside the result; the message says which."""
        if not failure.trace:
            return failure
        file = self.results.file(name).with_suffix(".crash.txt")
        write_text(file, failure.trace)
        return Failure(failure.code, f"{failure.message} Details are in {show(file)}.", failure.exit_code)


def _as_error(failure: Failure) -> BltoError:
    kind = Busy if failure.exit_code == Busy.exit_code else ResourceExhausted
    return kind(failure.message, code=failure.code)


def failed_line(failed: Sequence[CellState], total: int) -> BltoError:
    """One line on all failed cells, with the first one's code and exit code."""
    first = failed[0].result
    assert first is not None
    error = first.as_error()
    line = BltoError(
        f"{len(failed)} of {total} cells failed; the first, {show(first.cell, 80)}: {error} "
        "Go on with --retry-failed once it is mended.",
        code=error.code,
    )
    line.exit_code = error.exit_code
    return line
