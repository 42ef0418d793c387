"""The one way files are written: complete or not at all.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed into place; then the
folder is flushed. Whatever goes wrong, a reader finds the old file or the new one, never half of either.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from blto.errors import ConfigError, ResourceExhausted
from blto.files.reading import read_json, read_jsonl, sha256_file
from blto.files.text import show

__all__ = [
    "append_jsonl",
    "atomic_file",
    "atomic_write",
    "canonical_json",
    "disk_errors",
    "make_directory",
    "read_json",
    "read_jsonl",
    "remove_leftovers",
    "sha256_bytes",
    "sha256_file",
    "staged_directory",
    "write_json",
    "write_staged",
    "write_text",
]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.blto-tmp", re.DOTALL)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path`, making its folder if needed.

    Raises:
        ResourceExhausted: DISK-FULL or NOT-WRITABLE; `path` holds what it held before.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which appears at `path` when the block ends without an error.

    Raises:
        ResourceExhausted: as `atomic_write`.
    """
    make_directory(path.parent)
    temporary = _temporary(path)
    with disk_errors(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    sink = _Sink(descriptor, path)
    file = io.BufferedWriter(sink, 1 << 20)
    try:
        yield file
        file.flush()
        with disk_errors(path):
            os.fsync(descriptor)
            file.close()
            os.replace(temporary, path)
    except BaseException:
        sink.discarding = True
        file.close()
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent, path)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; errors as `atomic_write`."""
    atomic_write(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys; NaN and infinity are a ValueError, raised before anything is written."""
    atomic_write(path, (json.dumps(value, allow_nan=False, sort_keys=True, indent=1) + "\n").encode())


def write_staged(path: Path, data: bytes) -> None:
    """Write one of many files inside a `staged_directory`, which flushes all of them before it appears."""
    make_directory(path.parent)
    with disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def append_jsonl(path: Path, value: dict[str, Any]) -> None:
    """Append one record to a log that a single process writes.

    A record cut short by a kill is dropped by the next append and ignored by `read_jsonl`. Raises ResourceExhausted;
    the log then ends as it did before.
    """
    line = canonical_json(value) + b"\n"
    make_directory(path.parent)
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            end = _end_of_last_line(descriptor)
            os.ftruncate(descriptor, end)
            try:
                _write_all(descriptor, line)
            except BaseException:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def canonical_json(value: Any) -> bytes:
    """The one spelling of `value` that is hashed: sorted keys, no spaces, ASCII. NaN and infinity are a ValueError."""
    return json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":")).encode()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill, which is renamed to `path` when the block ends without an error.

    Raises:
        ConfigError: `path` exists and is not an empty folder; found before the block runs.
        ResourceExhausted: no room or no permission; nothing is left behind.
    """
    _refuse_occupied(path)
    make_directory(path.parent)
    temporary = _temporary(path)
    with disk_errors(path):
        os.mkdir(temporary)
    try:
        yield temporary
        with disk_errors(path):
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _refuse_occupied(path)
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(path.parent, path)


def make_directory(path: Path) -> None:
    """Make `path` and its missing parents, each flushed into the folder that holds it. Raises ResourceExhausted."""
    with disk_errors(path):
        if path.is_dir():
            return
    make_directory(path.parent)
    with disk_errors(path):
        os.makedirs(path, exist_ok=True)  # another process may have been faster
    _sync_directory(path.parent, path)


def remove_leftovers(directory: Path) -> list[str]:
    """Remove what killed writers left in `directory`, and nothing else; returns the names. Raises ResourceExhausted.

    To be called by whoever holds the directory's lock: a temporary file of a live writer looks the same.
    """
    removed = []
    with disk_errors(directory):
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if _LEFTOVER.fullmatch(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
                removed.append(entry.name)
    return removed


def remove_file(path: Path) -> None:
    """Remove one file; it may be missing. Raises ResourceExhausted where that is not permitted."""
    with disk_errors(path):
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into one line with the free space. Raises ResourceExhausted."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        free = _free_bytes(path)
        if error.errno in _FULL:
            advice = "Free space (or raise the quota or size limit) and run the same command"
            message = f"{show(path)}: no room to write ({reason}; {free} B free). {advice}."
            raise ResourceExhausted(message, code="DISK-FULL") from error
        message = f"{show(path)}: cannot be written ({reason}; {free} B free). Choose a writable place."
        raise ResourceExhausted(message, code="NOT-WRITABLE") from error


class _Sink(io.RawIOBase):
    """A file descriptor whose every write is complete; after a failure it swallows what buffers still hold."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._path = path
        self._position = 0
        self.discarding = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if not self.discarding:
            with disk_errors(self._path):
                _write_all(self._descriptor, view)
        self._position += len(view)
        return len(view)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:  # the kernel may take less than it is given: near a size limit it says so only on the next call
        view = view[os.write(descriptor, view) :]


def _temporary(path: Path) -> Path:
    # Cut to 50 characters (at most 200 bytes) so that a name as long as the file system allows still has a temporary.
    return path.parent / f".{path.name[:50]}.{secrets.token_hex(8)}.blto-tmp"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path, path: Path) -> None:
    with disk_errors(path):
        _sync(directory)


def _refuse_occupied(path: Path) -> None:
    try:
        free = not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
    except OSError:
        free = False
    if not free:
        raise ConfigError(f"{show(path)}: exists and is not empty; choose another folder or remove it.")


def _end_of_last_line(descriptor: int) -> int:
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _free_bytes(path: Path) -> int:
    for folder in path.parents:
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0
