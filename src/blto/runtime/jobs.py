"""A job, what may become of it, and who hands it out; an executor knows nothing else of it."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from blto.errors import BltoError, Interrupted, out_of_memory
from blto.files.text import show
from blto.runtime.interrupts import StopRequest, stopping_at

Tell = Callable[[str], None]
Work = Callable[[Any, Tell], Any]
"""(content of a job, where its progress goes) -> its result. Runs in a worker by its module and name."""


@dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        name: of the job, told back with everything that becomes of it.
        content: plain data for the work.
        deadline: moment of `time.monotonic` from which the work's stop requests are true; None is never.
    """

    name: str
    content: Any
    deadline: float | None = None


@dataclass(frozen=True)
class Failure:
    """An error as plain data: what the command line would print, its exit code, and a bug's traceback."""

    code: str
    message: str
    exit_code: int
    trace: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        seconds: of wall time that it took.
        value: the work's result, where it has one.
        failure: why it has none.
        stopped: it was interrupted and has saved its state; neither done nor failed.
        signal_number: the signal that stopped it; None where its time was over.
    """

    seconds: float
    value: Any = None
    failure: Failure | None = None
    stopped: bool = False
    signal_number: int | None = None


class Queue(Protocol):
    """What an executor works through."""

    def next(self) -> Job | None:
        """A job that has now begun; None where none is to be begun at present."""

    def told(self, name: str, text: str) -> None:
        """A job's progress."""

    def ended(self, name: str, outcome: Outcome) -> None:
        """A job's end. What this raises ends the executor, its workers included."""


class Executor(Protocol):
    """Runs jobs."""

    def run(self, queue: Queue, stop: StopRequest) -> None:
        """Work until the queue hands out nothing more; once `stop` is true, end what runs as SIGTERM would."""


def attempt(work: Work, job: Job, tell: Tell) -> Outcome:
    """Do a job here; whatever goes wrong becomes its outcome."""
    started = time.monotonic()

    def outcome(**facts: Any) -> Outcome:
        return Outcome(time.monotonic() - started, **facts)

    try:
        with stopping_at(job.deadline):
            return outcome(value=work(job.content, tell))
    except Interrupted as error:
        return outcome(stopped=True, signal_number=error.signal_number)
    except KeyboardInterrupt as error:  # a worker's names the signal
        return outcome(stopped=True, signal_number=error.args[0] if error.args else signal.SIGINT)
    except Exception as error:
        known = error if isinstance(error, BltoError) else out_of_memory(error)
        if known is not None:
            return outcome(failure=Failure(known.code, str(known), known.exit_code))
        what = f"{type(error).__name__}: {show(error, 100)}".rstrip(": ")
        trace = "".join(traceback.format_exception(error))
        return outcome(failure=Failure(BltoError.code, f"{what}. This is a bug in blto.", BltoError.exit_code, trace))
