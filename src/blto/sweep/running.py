"""A sweep from its cells to its result: the store's lock, the executor, and what is said at the end."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blto.errors import BltoError, ConfigError, Interrupted
from blto.files import DirectoryLock, remove_leftovers
from blto.records import RunStore
from blto.runtime.executors import build_executor
from blto.runtime.interrupts import stop_requests
from blto.runtime.jobs import Work
from blto.sweep.cell import run_cell
from blto.sweep.comparison import Comparison, compare
from blto.sweep.export import Exported, export_cells
from blto.sweep.live import SweepView
from blto.sweep.plan import Cell, Sweep
from blto.sweep.queue import CellState, SweepQueue, failed_line
from blto.sweep.results import FOLDER, Results


@dataclass(frozen=True)
class SweepResult:
    """How a sweep stands.

    Attributes:
        name: of the sweep.
        cells: in order, each with its status and, where it has one, its result.
        error: why it is not all done, where that is an error: cells failed, no room on the disk, a run in use.
        exported: what an export did, where one was asked for.
        comparison: the declared one, where the file has one.
    """

    name: str
    cells: Sequence[CellState]
    error: BltoError | None = None
    exported: Exported | None = None
    comparison: Comparison | None = None

    def count(self, status: str) -> int:
        """How many cells stand so: "done", "failed", "waiting"."""
        return sum(cell.status == status for cell in self.cells)


@dataclass(frozen=True)
class Conditions:
    """Where and how a sweep runs; no result depends on it, apart from the device's arithmetic.

    Attributes:
        store: folder of the runs.
        data_root, device: as in `experiment.Environment`.
        executor: "serial" or "processes".
        workers: of "processes"; None is one for each core.
        max_hours, expected_hours, retry_failed: as in SweepQueue.
        quiet: no progress.
        work: what is done with a cell.

    Raises:
        ConfigError: hours that are no positive number.
    """

    store: Path
    data_root: Path | None = None
    device: str = "cpu"
    executor: str = "serial"
    workers: int | None = None
    max_hours: float | None = None
    expected_hours: float | None = None
    retry_failed: bool = False
    quiet: bool = False
    work: Work = field(default=run_cell)

    def __post_init__(self) -> None:
        for name, hours in (("max-hours", self.max_hours), ("expected-hours", self.expected_hours)):
            if hours is not None and not 0 < hours < float("inf"):
                raise ConfigError(f"--{name} is {hours:g}; give a number of hours above 0.")


def run_sweep(sweep: Sweep, how: Conditions) -> SweepResult:
    """Run every cell that is not done, in order, each at most once.

    Raises:
        ConfigError: `max_hours` is too short for a cell; an executor or a number of workers that there is not.
        Busy: another sweep uses the store; names its pid and host.
        Interrupted: Ctrl-C or SIGTERM; what ran has saved its state, and the same call goes on.
        ResourceExhausted: a result cannot be written.
    """
    group = f"{os.getpid()}-{secrets.token_hex(4)}"
    executor = build_executor(how.executor, how.work, workers=how.workers)
    at_once = 1 if how.executor == "serial" else how.workers or len(os.sched_getaffinity(0))
    view = SweepView(workers=at_once, quiet=how.quiet)

    def content(cell: Cell) -> dict[str, object]:
        return {
            "spec": cell.spec.model_dump(mode="json"),
            "store": str(how.store),
            "group": group,
            "data_root": None if how.data_root is None else str(how.data_root),
            "device": how.device,
        }

    def queue() -> SweepQueue:
        return SweepQueue(
            sweep,
            Results(how.store, sweep.name),
            content,
            view,
            max_hours=how.max_hours,
            expected_hours=how.expected_hours,
            retry_failed=how.retry_failed,
        )

    queue().check_time()  # before anything is written
    with DirectoryLock(how.store / FOLDER):
        cells = queue()  # as they stand now that nobody else works on them
        if cells.results.folder.is_dir():
            remove_leftovers(cells.results.folder)
        with view.showing(cells), stop_requests() as stop:
            executor.run(cells, stop)
    return _result(cells, stop.signal_number or cells.stopped_by)


def _result(queue: SweepQueue, signal_number: int | None) -> SweepResult:
    """What came of it. Raises Interrupted where a signal stopped it before all was done."""
    done, failed, total = queue.of("done"), queue.of("failed"), len(queue.states)
    if signal_number is not None and queue.of("waiting"):
        raise Interrupted(
            f"stopped with {len(done)} of {total} cells done; the state of the others is kept.",
            signal_number=signal_number,
        )
    error = queue.halted or (failed_line(failed, total) if failed else queue.busy)
    return SweepResult(queue.sweep.name, list(queue.states.values()), error, comparison=_comparison(queue))


def _comparison(queue: SweepQueue) -> Comparison | None:
    """The declared comparison as it stands."""
    if queue.sweep.comparison is None:
        return None
    cells, pairs = queue.states.values(), queue.sweep.pairs
    return compare(
        queue.sweep.comparison, pairs, {(each.cell.name, each.cell.spec.seed): each.result for each in cells}
    )


def export_sweep(sweep: Sweep, store: Path, out: Path) -> SweepResult:
    """Copy what is worth keeping of the finished cells to `out`; see `export`. Runs nothing and waits for nobody."""
    results = Results(store, sweep.name)
    exported = export_cells(sweep.cells, results, RunStore(store), out)
    queue = SweepQueue(sweep, results, lambda cell: {}, SweepView(quiet=True))
    comparison = _comparison(queue)
    exported.keep_json(out / "comparison.json", comparison.as_json() if comparison and not comparison.waiting else None)
    return SweepResult(sweep.name, list(queue.states.values()), exported=exported, comparison=comparison)
