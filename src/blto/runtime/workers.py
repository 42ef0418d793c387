"""The executor of worker processes.

Workers are spawned, not forked: each starts without threads, and with the number of threads that libraries read as they
are loaded.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from blto.errors import BltoError, ResourceExhausted
from blto.runtime.interrupts import StopRequest
from blto.runtime.jobs import Failure, Job, Outcome, Queue, Tell, Work, attempt

SECONDS_BETWEEN_LOOKS = 0.2
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_PR_SET_PDEATHSIG = 1


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
                        worker.terminate()
                for connection in wait(list(busy), timeout=SECONDS_BETWEEN_LOOKS):
                    self._hear(busy[connection], queue)  # type: ignore[index]
        finally:
            for worker in self._workers:
                worker.end()
            self._workers.clear()

    def _hand_out(self, queue: Queue) -> None:
        """Give every idle worker a job, if there are any; a worker is started for its first one, or for a dead one."""
        for worker in [each for each in self._workers if each.job is None and not each.process.is_alive()]:
            self._workers.remove(worker)
            worker.end()
        idle = [worker for worker in self._workers if worker.job is None]
        taken = {worker.slot for worker in self._workers}
        free = [slot for slot in range(len(self._cores)) if slot not in taken]
        while (idle or free) and (job := queue.next()) is not None:
            if not idle:
                slot = free.pop(0)
                self._workers.append(_Worker(slot, self._cores[slot], self._entry))
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

    def __init__(self, slot: int, core: int, entry: str) -> None:
        self.slot = slot
        self.job: Job | None = None
        self.began, self.was_asked = 0.0, False
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

    def terminate(self) -> None:
        """Ask it to stop as SIGTERM does."""
        self.was_asked = True
        self.process.terminate()

    def death(self) -> Outcome:
        """What its death makes of its job."""
        self.connection.close()
        self.process.join()
        code, seconds = self.process.exitcode or 0, time.monotonic() - self.began
        if code == -signal.SIGTERM or (code == 0 and self.was_asked):  # where it could not answer
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
    raise KeyboardInterrupt(number)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, even by SIGKILL: the locks it holds are then free."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)
