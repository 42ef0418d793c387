"""The executor of a Ray cluster: jobs as tasks, each of which is begun again where its worker or its machine dies.

Ray is optional (`pip install 'blto[ray]'`) and imported here alone. Workers need blto, and the same paths.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

from blto.errors import ConfigError, ResourceExhausted
from blto.files.text import show
from blto.runtime.interrupts import StopRequest
from blto.runtime.jobs import Failure, Job, Outcome, Queue, Work, attempt

SECONDS_TO_ANSWER = 5.0
SECONDS_BETWEEN_LOOKS = 0.2
TRIES = 3
"""How often a task is begun again whose worker has died."""
AHEAD = 2
"""Tasks that wait beside those that run, so that no worker waits."""


_SETTINGS = b"\x04"  # the type of the frame with which either side of HTTP/2 begins (RFC 9113, 3.4)
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)


class OnRay:
    """Jobs as tasks of a Ray cluster, one core and one thread each.

    Args:
        work: a function of a module.
        address: of a cluster ("host:port", or "ray://host:port"); None starts one on this machine, for one run.
        workers: how many tasks run at once; None is one for each core of the cluster.

    Raises:
        ConfigError: Ray is not installed, or nobody answers at the address.
    """

    def __init__(self, work: Work, *, address: str | None = None, workers: int | None = None) -> None:
        self._ray, self._address, self._workers = _imported(), address, workers
        self._entry = f"{work.__module__}:{work.__qualname__}"
        if address is not None:
            _require_answer(address)

    def run(self, queue: Queue, stop: StopRequest) -> None:
        """As in Executor. Once `stop` is true, tasks are given up: what they would have made is made the next time."""
        # Ray prints of every worker that dies, until it is shut down, on standard output, which is kept for results.
        with redirect_stdout(io.StringIO()), self._connected() as at_once:
            task = self._ray.remote(num_cpus=1, max_retries=TRIES)(_do)
            running: dict[Any, Job] = {}
            try:
                while not stop:
                    while len(running) < at_once + AHEAD and (job := queue.next()) is not None:
                        running[task.remote(self._entry, job)] = job
                    if not running:
                        return
                    done, _ = self._ray.wait(list(running), timeout=SECONDS_BETWEEN_LOOKS)
                    for reference in done:
                        queue.ended(running.pop(reference).name, self._outcome(reference))
            finally:
                for reference in running:
                    self._ray.cancel(reference, force=True)

    def _outcome(self, reference: Any) -> Outcome:
        """What became of a task; its workers may all have died."""
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            message = f"its workers on Ray died {TRIES + 1} times ({type(error).__name__}). Give them more memory."
            return Outcome(0.0, failure=Failure("OUT-OF-MEMORY", message, ResourceExhausted.exit_code))
        return outcome  # type: ignore[no-any-return]

    @contextmanager
    def _connected(self) -> Iterator[int]:
        """How many tasks may run at once, while connected to a cluster; one that runs already is used and left."""
        started = not self._ray.is_initialized()
        if started:
            own = {} if self._address else {"num_cpus": self._workers, "include_dashboard": False}
            try:
                with _quiet(), _own_signals():
                    self._ray.init(address=self._address or "local", logging_level="ERROR", log_to_driver=False, **own)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                raise _no_cluster(self._address or "this machine", error) from error
        try:
            cores = int(self._ray.cluster_resources().get("CPU", 1))
            yield min(cores, self._workers or cores)
        finally:
            if started:
                with _quiet():
                    self._ray.shutdown()


def _do(entry: str, job: Job) -> Outcome:
    """A task: do a job, with the function that `entry` names."""
    module, _, name = entry.partition(":")
    return attempt(getattr(import_module(module), name), job, lambda text: None)


def _imported() -> Any:
    """Ray. Raises ConfigError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with _quiet():
            return import_module("ray")
    except ImportError as error:
        raise ConfigError("--executor ray: Ray is not installed; run pip install 'blto[ray]'.") from error


def _require_answer(address: str) -> None:
    """Raises ConfigError where nobody listens who speaks HTTP/2, as Ray does: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER) as line:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            line.sendall(_HELLO)
            if line.recv(4)[3:] != _SETTINGS:
                raise OSError("somebody else listens")
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--address {show(address, 80)}: no Ray cluster answers there ({show(error, 80)}); give host:port of one that "
        "runs, or none for one on this machine."
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM as the end of the process; whoever has asked for it before is to hear of it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray warns about itself, where our one line should stand alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
