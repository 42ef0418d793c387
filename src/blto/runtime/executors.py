"""Where jobs run: one after the other in this process, in worker processes pinned to one core each, or on Ray.

An executor takes jobs from a queue for as long as the queue hands any out, and tells it what becomes of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from blto.errors import ConfigError, nearest
from blto.files.text import show
from blto.runtime.interrupts import StopRequest
from blto.runtime.jobs import Executor, Queue, Work, attempt
from blto.runtime.on_ray import OnRay
from blto.runtime.workers import Processes

EXECUTORS = ("serial", "processes")
WITH_RAY = (*EXECUTORS, "ray")


def build_executor(
    name: str,
    work: Work,
    *,
    workers: int | None = None,
    address: str | None = None,
    known: Sequence[str] = EXECUTORS,
) -> Executor:
    """An executor by its name.

    Args:
        name: one of `known`.
        work: a function of a module.
        workers: number of processes; None is one for each core that this process may use, on Ray of the cluster.
        address: of a Ray cluster; None starts one here.
        known: the executors that the work is fit for. On Ray it is begun again where a worker dies, and it has to
            find its files wherever it runs.

    Raises:
        ConfigError: an unknown name, more workers than cores, workers for "serial", or see `OnRay`.
    """
    cores = sorted(os.sched_getaffinity(0))
    if name not in known:
        raise ConfigError(f'--executor: unknown executor "{show(name, 60)}"; {nearest(name, known)}.')
    if address is not None and name != "ray":
        raise ConfigError(f"--address {show(address, 80)}: only for a Ray cluster; add --executor ray.")
    if name == "ray":
        if workers is not None and workers < 1:
            raise ConfigError(f"--workers is {workers}; give 1 or more.")
        return OnRay(work, address=address, workers=workers)
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
