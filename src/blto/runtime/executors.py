"""Where jobs run: one after the other in this process, or in worker processes pinned to one core each.

An executor takes jobs from a queue for as long as the queue hands any out, and tells it what becomes of them.
"""

from __future__ import annotations

import os
from functools import partial

from blto.errors import ConfigError, nearest
from blto.files.text import show
from blto.runtime.interrupts import StopRequest
from blto.runtime.jobs import Executor, Queue, Work, attempt
from blto.runtime.workers import Processes

EXECUTORS = ("serial", "processes")


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


class Serial:
    """Jobs one after the other in this process, with all of its threads."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def run(self, queue: Queue, stop: StopRequest) -> None:
        """As in Executor."""
        while not stop and (job := queue.next()) is not None:
            queue.ended(job.name, attempt(self._work, job, partial(queue.told, job.name)))
