"""Reading files that this run did not write: regular files only, with a size limit, read once into memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from blto.errors import InputRefused
from blto.files.text import show

GIB = 1 << 30
_MAX_JSON_BYTES = 256 << 20


def open_regular(path: Path, *, follow_links: bool = True, code: str | None = None) -> io.BufferedReader:
    """Open a regular file for reading; a pipe or a device is refused and never waited for.

    Raises:
        InputRefused: missing, unreadable, not a regular file, or a link where links are not followed.
    """
    # O_NONBLOCK: opening a FIFO would otherwise hang. What it is gets asked of the open file, not of the name.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputRefused(f"{show(path)}: cannot be opened ({reason}). Give a readable file.", code=code) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputRefused(f"{show(path)}: not a regular file. Give a file, not a folder, pipe or device.", code=code)
    return open(descriptor, "rb")


def read_bytes(path: Path, *, max_bytes: int = GIB, follow_links: bool = True, code: str | None = None) -> bytes:
    """The whole file, read once, so that what is hashed is what is parsed.

    Raises:
        InputRefused: as `open_regular`, or larger than `max_bytes`.
    """
    with open_regular(path, follow_links=follow_links, code=code) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            too_large = size > max_bytes
            data = b"" if too_large else file.read(size + 1)  # not more: so much is allocated, whatever is there
            if len(data) > size:  # it grows
                data += file.read(max_bytes + 1 - len(data))
        except OSError as error:
            raise InputRefused(f"{show(path)}: cannot be read ({error.strerror}).", code=code) from error
    if too_large or len(data) > max_bytes:
        raise InputRefused(f"{show(path)}: larger than the limit of {max_bytes} bytes.", code=code)
    return data


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file as 64 hex digits, read in pieces. Raises InputRefused."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputRefused(f"{show(path)}: cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises InputRefused naming the file when it is missing, damaged or holds NaN."""
    return parse_json(read_bytes(path, max_bytes=_MAX_JSON_BYTES), show(path))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of a log; a last line without its newline was never finished and is left out.

    Raises:
        InputRefused: missing, or another line is damaged; the message names file and line.
    """
    records = []
    for number, line in enumerate(read_bytes(path, max_bytes=_MAX_JSON_BYTES).split(b"\n")[:-1], start=1):
        record = parse_json(line, f"{show(path)}: line {number}")
        if not isinstance(record, dict):
            raise InputRefused(f"{show(path)}: line {number}: not a record. Restore the file or remove that line.")
        records.append(record)
    return records


def parse_json(data: bytes, where: str, *, code: str | None = None) -> Any:
    """The value of a JSON text; `where` starts the message. Raises InputRefused."""
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{where}: not valid JSON ({show(error, 80)}). Restore the file.", code=code) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
