"""Where jobs run: one after the other in this process, or in worker processes pinned to one core each.

An executor takes jobs from a queue for as long as the queue hands any out, and tells it what becomes of them. It knows
nothing of what a job is: the work is a function of the job's content. Workers are spawned, not forked, so that each
starts without threads, with the numbers of threads that libraries read as they are loaded.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, Protocol

from blto.errors import BltoError, ConfigError, Interrupted, ResourceExhausted, nearest, out_of_memory
from blto.files.text import show
from blto.runtime.interrupts import StopRequest, stopping_at

Tell = Callable[[str], None]
Work = Callable[[Any, Tell], Any]
"""(content of a job, where its progress goes) -> its result. Runs in a worker by its module and name."""

EXECUTORS = ("serial", "processes")
SECONDS_BETWEEN_LOOKS = 0.2
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_PR_SET_PDEATHSIG = 1


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


def build_executor(name: str, work: Work, *, workers: int | None = None) -> Executor:
    """An executor by its name.

    Args:
        name: "serial" or "processes".
        work: a function of a module.
        workers: number of processes; None is one for each core that this process may use.

    Raises:
        ConfigError: an unknown name, more workers than cores, or workers for "serial".
    """
    cores = sorted(os.sched_getaffinity(0))
    if name not in EXECUTORS:
        raise ConfigError(f'--executor: unknown executor "{show(name, 60)}"; {nearest(name, EXECUTORS)}.')
    if name == "serial":
        if workers not in (None, 1):
            raise ConfigError(f"--workers is {workers}, but the serial executor has one; add --executor processes.")
        return Serial(work)
    if workers is not None and not 1 <= workers <= len(cores):
        raise ConfigError(
            f"--workers is {workers}, but {len(cores)} cores may be used, one a worker; give 1 to {len(cores)}."
        )
    return Processes(work, cores[:workers])


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
    except KeyboardInterrupt:
        return outcome(stopped=True, signal_number=signal.SIGINT)
    except Exception as error:
        known = error if isinstance(error, BltoError) else out_of_memory(error)
        if known is not None:
            return outcome(failure=Failure(known.code, str(known), known.exit_code))
        what = f"{type(error).__name__}: {show(error, 100)}".rstrip(": ")
        trace = "".join(traceback.format_exception(error))
        return outcome(failure=Failure(BltoError.code, f"{what}. This is a bug in blto.", BltoError.exit_code, trace))


class Serial:
    """Jobs one after the other in this process, with all of its threads."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def run(self, queue: Queue, stop: StopRequest) -> None:
        """As in Executor."""
        while not stop and (job := queue.next()) is not None:
            name = job.name
            queue.ended(name, attempt(self._work, job, lambda text, name=name: queue.told(name, text)))  # type: ignore[misc]


class Processes:
    """Jobs in worker processes, each pinned to one core and with one thread.

    A worker that dies fails its job, and another takes its place. Workers do not outlive this process, however it
    ends, and Ctrl-C reaches them through it alone.
    """

    def __init__(self, work: Work, cores: Sequence[int]) -> None:
        if "<" in work.__qualname__:
            raise ValueError(f"a worker cannot import {work.__qualname__}: give a function of a module")
        self._entry = f"{work.__module__}:{work.__qualname__}"
        self._cores = list(cores)
        self._workers: list[_Worker] = []

    def run(self, queue: Queue, stop: StopRequest) -> None:
        """As in Executor."""
        asked = False
        try:
            while True:
                if not stop:
                    self._hand_out(queue)
                busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
                if not busy:
                    return
                if stop and not asked:
                    asked = True
                    for worker in busy.values():
                        worker.process.terminate()
                for connection in wait(list(busy), timeout=SECONDS_BETWEEN_LOOKS):
                    self._hear(busy[connection], queue)  # type: ignore[index]
        finally:
            for worker in self._workers:
                worker.end()
            self._workers.clear()

    def _hand_out(self, queue: Queue) -> None:
        """Give every idle worker a job, if there are any; a worker is started for its first one."""
        idle = [worker for worker in self._workers if worker.job is None]
        free = [core for core in self._cores if core not in {worker.core for worker in self._workers}]
        while (idle or free) and (job := queue.next()) is not None:
            if not idle:
                self._workers.append(_Worker(free.pop(0), self._entry))
                idle.append(self._workers[-1])
            idle.pop(0).begin(job)

    def _hear(self, worker: _Worker, queue: Queue) -> None:
        """Take one message of a worker, or note that it has died."""
        assert worker.job is not None
        name = worker.job.name
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            queue.ended(name, worker.death())
            return
        if kind == "told":
            queue.told(name, content)
            return
        worker.job = None
        if content.stopped:  # it ends by itself
            self._workers.remove(worker)
            worker.end()
        queue.ended(name, content)


class _Worker:
    """A process and the line to it."""

    def __init__(self, core: int, entry: str) -> None:
        self.core = core
        self.job: Job | None = None
        self.began = 0.0
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs, core, entry, os.getpid()))
        self.process.start()
        theirs.close()  # else its end would not be noticed

    def begin(self, job: Job) -> None:
        """Send a job. A worker that has just died is noticed when it is listened to."""
        self.job, self.began = job, time.monotonic()
        with suppress(OSError):
            self.connection.send(job)

    def death(self) -> Outcome:
        """What its death makes of its job."""
        self.connection.close()
        self.process.join()
        code, seconds = self.process.exitcode or 0, time.monotonic() - self.began
        if code in (0, -signal.SIGTERM):  # asked to end where it could not answer
            return Outcome(seconds, stopped=True, signal_number=signal.SIGTERM)
        if code == -signal.SIGKILL:
            advice = "Lower pretraining.batch_size or the number of workers, or free memory"
            message = f"its worker was killed, most likely for want of memory. {advice}."
            return Outcome(seconds, failure=Failure("OUT-OF-MEMORY", message, ResourceExhausted.exit_code))
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        return Outcome(seconds, failure=Failure(BltoError.code, f"its worker ended by {how}.", BltoError.exit_code))

    def end(self, seconds: float = 5.0) -> None:
        """Close the line, which ends an idle worker; one that does not end is killed."""
        self.connection.close()
        if self.job is not None:
            self.process.kill()
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, core: int, entry: str, parent: int) -> None:
    """A worker's life: a job in, its outcome out, until the line is closed or it was stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    _die_with(parent)
    with suppress(OSError):
        os.setsid()  # Ctrl-C at the terminal is the parent's to pass on
    os.sched_setaffinity(0, {core})
    os.environ.update(dict.fromkeys(_THREADS, "1"))

    def work(content: Any, tell: Tell) -> Any:
        module, _, name = entry.partition(":")
        return getattr(import_module(module), name)(content, tell)

    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            outcome = attempt(work, connection.recv(), lambda text: connection.send(("told", text)))
            connection.send(("ended", outcome))
            if outcome.stopped:
                return


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM where no loop has taken it as a request."""
    raise KeyboardInterrupt


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, even by SIGKILL: the locks it holds are then free."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)
