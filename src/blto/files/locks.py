"""A lock on a folder that dies with the process that holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from blto.errors import Busy
from blto.files.atomic import disk_errors, make_directory
from blto.files.text import show

SECONDS_BETWEEN_TRIES = 0.1
GRACE_SECONDS = 1.5
"""How long one of a group waits for a holder that does not name itself yet, or that the kernel is still ending."""
_held: dict[int, DirectoryLock] = {}


class DirectoryLock:
    """Context manager: at most one live process is inside for one folder.

    The kernel holds the lock (`flock` on `<path>/.lock`), so a killed owner leaves nothing to clean up. The file stays:
    removing it would let two processes lock two different files of the same name.

    Args:
        path: the folder; made if need be.
        group: of processes that work together, such as the workers of a sweep: each waits for the others.
        say: takes a line where one is waited for.

    Raises:
        Busy: another process is inside; names its pid, host and start time. Outside of a group this never waits.
    """

    def __init__(self, path: Path, *, group: str = "", say: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.group = group
        self._say = say
        self._descriptor: int | None = None

    def __enter__(self) -> DirectoryLock:
        make_directory(self.path)
        with disk_errors(self.path / ".lock"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self.path / ".lock", flags, 0o666)
            try:
                self._acquire(descriptor)
                owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
                if self.group:
                    owner["group"] = self.group
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner).encode(), 0)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        _held[descriptor] = self
        return self

    def _acquire(self, descriptor: int) -> None:
        """Take the kernel's lock; wait where the holder is of the same group."""
        patience, said = time.monotonic() + GRACE_SECONDS if self.group else 0.0, False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder, group = _holder(os.pread(descriptor, 1000, 0))
                if self.group and group == self.group:
                    patience = time.monotonic() + GRACE_SECONDS
                    if self._say and not said:
                        self._say(f"waits for {show(self.path.name)}, in use by {holder}")
                        said = True
                elif time.monotonic() >= patience:
                    advice = "Wait for it or choose another folder"
                    raise Busy(f"{show(self.path)}: in use by {holder}. {advice}.") from error
                time.sleep(SECONDS_BETWEEN_TRIES)
            else:
                return

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


def _holder(data: bytes) -> tuple[str, str]:
    """Who holds the lock, in words, and its group."""
    try:
        owner = json.loads(data)
        who = f"pid {int(owner['pid'])} on host {show(owner['host'], 60)} since {show(owner['since'], 40)}"
        return who, str(owner.get("group", ""))
    except (ValueError, TypeError, KeyError):
        return "another process", ""  # it has the lock but has not yet written who it is


def _forget_in_child() -> None:
    """Close the child's copies: a data-loading worker that outlives a killed owner must not keep the folder locked."""
    for descriptor, lock in _held.items():
        os.close(descriptor)
        lock._descriptor = None
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
