"""Jobs whose results are kept one by one, so that a scan goes on after a kill where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blto.errors import BltoError, InputRefused, Interrupted
from blto.files import remove_leftovers
from blto.files.atomic import remove_file
from blto.records import StageFolder, read_sealed, write_sealed
from blto.runtime.interrupts import stop_requests
from blto.runtime.jobs import Executor, Job, Outcome
from blto.runtime.progress import Advance, Progress

PARTS = ".part-"  # hidden: no part of what the stage vouches for
TRIES = 2
"""How often a job is begun whose worker is killed, before that counts."""
Enough = Callable[[Mapping[str, Any]], bool]


class Kept:
    """Small results in a stage's folder, by number. They belong to a stage that is not finished, which has the lock."""

    def __init__(self, stage: StageFolder) -> None:
        self._folder = stage.path
        remove_leftovers(stage.path)

    def load(self, number: int) -> dict[str, Any] | None:
        """A result; None where there is no whole one."""
        file = self._file(number)
        if not file.is_file():
            return None
        try:
            return dict(read_sealed(file, "result")["value"])
        except InputRefused:
            return None

    def save(self, number: int, value: Mapping[str, Any]) -> None:
        """Keep a result. Raises ResourceExhausted."""
        write_sealed(self._file(number), {"schema_version": 1, "value": dict(value)})

    def _file(self, number: int) -> Path:
        return self._folder / f"{PARTS}{number:07d}.json"


def remove_parts(stage: StageFolder) -> None:
    """Remove the results of a stage that is finished and has what they add up to."""
    for file in stage.path.glob(f"{PARTS}*"):
        remove_file(file)


class PartQueue:
    """Hands out the jobs that have no result yet (`runtime.jobs.Queue`).

    Attributes:
        failure: of the first job that failed; nothing is begun after it.

    Args:
        contents: of the jobs, in order.
        kept: their results.
        enough: told of each result; true ends the work early.
        advance: told how many are done.
    """

    def __init__(self, contents: Iterator[Any], kept: Kept, enough: Enough, advance: Advance) -> None:
        self.failure: BltoError | None = None
        self.count, self.done, self.finished = 0, 0, False
        self._contents, self._kept, self._enough, self._advance = contents, kept, enough, advance
        self._begun: dict[str, tuple[Job, int]] = {}
        self._again: list[str] = []

    def next(self) -> Job | None:
        """See `runtime.jobs.Queue`. What listing the images raises ends the executor."""
        if self._over():
            return None
        if self._again:
            return self._begun[self._again.pop()][0]
        for content in self._contents:
            number, self.count = self.count, self.count + 1
            if (known := self._kept.load(number)) is None:
                job = Job(str(number), content)
                self._begun[job.name] = (job, 1)
                return job
            self._note(known)
            if self._over():
                break
        return None

    def told(self, name: str, text: str) -> None:
        """See `runtime.jobs.Queue`."""

    def ended(self, name: str, outcome: Outcome) -> None:
        """See `runtime.jobs.Queue`. Raises ResourceExhausted where the result cannot be kept."""
        if outcome.stopped:
            return
        job, tries = self._begun.pop(name)
        if outcome.failure is None:
            self._kept.save(int(name), outcome.value)
            self._note(outcome.value)
        elif outcome.failure.code == "OUT-OF-MEMORY" and tries < TRIES:
            self._begun[name] = (job, tries + 1)
            self._again.append(name)
        elif self.failure is None:
            self.failure = BltoError(outcome.failure.message, code=outcome.failure.code)
            self.failure.exit_code = outcome.failure.exit_code

    def _over(self) -> bool:
        return self.finished or self.failure is not None

    def _note(self, value: Mapping[str, Any]) -> None:
        self.done += 1
        self._advance(self.done, "")
        self.finished = self.finished or self._enough(value)


def work_through(
    contents: Iterator[Any],
    kept: Kept,
    executor: Executor,
    *,
    total: int,
    title: str,
    progress: Progress,
    enough: Enough = lambda value: False,
) -> int:
    """Do all jobs that have no result yet; returns how many there are, with those that had one.

    Args:
        contents: of the jobs, in order.
        kept: their results.
        executor: of the work.
        total: how many there will be, for `title` on `progress`.
        enough: told of each result; true ends the work early.

    Raises:
        Interrupted: a signal came; what is done is kept.
        BltoError: of a job that failed.
    """
    with progress.bar(title, total) as advance, stop_requests() as stop:
        queue = PartQueue(contents, kept, enough, advance)
        executor.run(queue, stop)
    if queue.failure is not None:
        raise queue.failure
    if stop and not queue.finished and queue.done < total:
        raise Interrupted(
            f"stopped with {queue.done} of {total} parts done; they are kept, and the same command goes on.",
            signal_number=stop.signal_number,
        )
    return queue.count
