"""A lock on a folder that dies with the process that holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from blto.errors import Busy
from blto.files.atomic import disk_errors, make_directory
from blto.files.text import show

_held: dict[int, DirectoryLock] = {}


class DirectoryLock:
    """Context manager: at most one live process is inside for one folder.

    The kernel holds the lock (`flock` on `<path>/.lock`), so a killed owner leaves nothing to clean up. The file stays:
    removing it would let two processes lock two different files of the same name.

    Raises:
        Busy: another process is inside; names its pid, host and start time. Never waits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __enter__(self) -> DirectoryLock:
        make_directory(self.path)
        with disk_errors(self.path / ".lock"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self.path / ".lock", flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner).encode(), 0)
            except BlockingIOError as error:
                holder = _holder(os.pread(descriptor, 1000, 0))
                os.close(descriptor)
                advice = "Wait for it or choose another folder"
                raise Busy(f"{show(self.path)}: in use by {holder}. {advice}.") from error
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        _held[descriptor] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is None:  # a forked child: the parent still holds the lock
            return
        del _held[self._descriptor]
        os.ftruncate(self._descriptor, 0)  # no host name stays in a folder that may be shared
        os.close(self._descriptor)
        self._descriptor = None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _holder(data: bytes) -> str:
    try:
        owner = json.loads(data)
        return f"pid {int(owner['pid'])} on host {show(owner['host'], 60)} since {show(owner['since'], 40)}"
    except (ValueError, TypeError, KeyError):
        return "another process"  # it has the lock but has not yet written who it is


def _forget_in_child() -> None:
    """Close the child's copies: a data-loading worker that outlives a killed owner must not keep the folder locked."""
    for descriptor, lock in _held.items():
        os.close(descriptor)
        lock._descriptor = None
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
