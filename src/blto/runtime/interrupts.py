"""Ctrl-C and SIGTERM as a request: the step in hand is finished and saved; a second one stops at once.

The end of a given time is such a request too; see `stopping_at`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from blto.errors import Interrupted

_moments: list[float] = []  # of the blocks of `stopping_at` around what runs now
_requests: list[StopRequest] = []  # of the blocks of `stop_requests`, the innermost last


class StopRequest:
    """True once a signal has asked the run to stop, or its time is over (no signal number then)."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None or any(moment <= time.monotonic() for moment in _moments)


@contextmanager
def stopping_at(moment: float | None) -> Iterator[None]:
    """While the block runs, every stop request is true from `moment` (of `time.monotonic`) on; None: never."""
    if moment is None:
        yield
        return
    _moments.append(moment)
    try:
        yield
    finally:
        _moments.pop()


def heed_signals() -> None:
    """For work of many parts that keeps nothing in between: stop here if a signal came.

    Raises:
        Interrupted: a block of `stop_requests` around what runs now has caught one. Outside of all blocks a signal
            needs no such help. The end of a given time does not count: what has no steps is finished.
    """
    if _requests and (number := _requests[-1].signal_number) is not None:
        raise Interrupted("stopped; finished stages and the last checkpoint are kept.", signal_number=number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs. Outside the main thread signals stay as they are.

    Blocks may be nested: a signal to one of them is a request to all.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    outer = _requests[-1] if _requests else request
    request.signal_number = outer.signal_number

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None:
            raise KeyboardInterrupt
        request.signal_number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _requests.append(request)
    try:
        yield request
    finally:
        _requests.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
        outer.signal_number = request.signal_number
