"""torch's zip checkpoints (`torch.save` since 1.6), read without running anything and without unpacking anything.

Accepted is what torch writes: members stored and not compressed, one after the other in one folder, one `data.pkl`,
storages `data/<number>`, each with the right CRC-32 (which `torch.load` does not look at), one directory at the end and
nothing behind it. So no other reader can see another file in the same bytes. An archive with code is refused by name.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib

from blto.files.foreign.groups import MAX_TENSORS, grouped
from blto.files.foreign.pickles import CodeFoundError, RefusedError
from blto.files.foreign.weights import Array, Storage, Weights
from blto.files.text import show

START = b"PK\x03\x04"
MAX_INDEX_BYTES = 16 << 20
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_KNOWN = re.compile(
    r"data\.pkl|data/[0-9]+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
_ENCRYPTED = 0x1
_MOST_BETWEEN = 24
"""Bytes of a data descriptor, all that lies between a member's data and what follows."""


class ZipCheckpoint:
    """An opened zip checkpoint.

    Args:
        data: the whole file.

    Raises:
        RefusedError: anything but what torch writes.
        Exception: of any kind, for a damaged file.

    Attributes:
        groups: see `weights.grouped`.
    """

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        directory = _directory(data)
        self._members = _members(zipfile.ZipFile(io.BytesIO(data)).infolist(), self._data, directory)
        self._whole: set[str] = set()
        if len(self._members["data.pkl"][0]) > MAX_INDEX_BYTES:
            raise RefusedError(f"its index is larger than {MAX_INDEX_BYTES:,} bytes")
        if "byteorder" in self._members and bytes(self._read("byteorder")) != b"little":
            raise RefusedError("its numbers are big-endian; save it again on an ordinary machine")
        self.groups = grouped(Weights(self._check).run(bytes(self._read("data.pkl"))), len(data))

    def arrays(self, group: str) -> dict[str, Array]:
        """The arrays of a group, from storages whose CRC-32 is checked. Raises RefusedError where one is wrong."""
        members = self.groups[group].items()
        return {name: tensor.taken_from(self._read(f"data/{tensor.storage.key}")) for name, tensor in members}

    def _read(self, name: str) -> memoryview:
        view, checksum = self._members[name]
        if name not in self._whole:
            if zlib.crc32(view) != checksum:
                raise RefusedError(f"damaged (the checksum of {show(name, 60)} does not match)")
            self._whole.add(name)
        return view

    def _check(self, storage: Storage) -> None:
        view, _ = self._members.get(f"data/{storage.key}", (b"", 0))
        if len(view) < storage.nbytes:
            raise RefusedError("it has a tensor whose bytes are missing or cut short")


def _directory(data: bytes) -> int:
    """Where the one directory begins, which must end where the file does."""
    end = data[-22:]
    if not end.startswith(_END) or end[20:] != b"\0\0":
        raise RefusedError("damaged or cut short: it does not end as torch's files do")
    count, size, start = struct.unpack("<HII", end[10:20])
    behind = len(data) - 22
    if data[behind - 20 : behind - 16] == _LOCATOR_64:
        (place,) = struct.unpack("<Q", data[behind - 12 : behind - 4])
        record = data[place : place + 56]
        if not record.startswith(_END_64) or place + 56 != behind - 20:
            raise RefusedError("damaged: its directory is not where it is said to be")
        count, size, start = struct.unpack("<QQQ", record[32:56])
        behind = place
    if start + size != behind or count > MAX_TENSORS:
        raise RefusedError("damaged: its directory is not where it is said to be, or has too many entries")
    return int(start)


def _members(listed: list[zipfile.ZipInfo], data: memoryview, directory: int) -> dict[str, tuple[memoryview, int]]:
    """The content and the checksum of each member by its name in the archive's one folder."""
    found: dict[str, tuple[memoryview, int]] = {}
    folder, position = "", 0
    for member in sorted(listed, key=lambda each: each.header_offset):
        root, _, name = member.filename.partition("/")
        if name.startswith("code/") or name == "constants.pkl":
            raise CodeFoundError("it is a TorchScript archive, which holds code; ask for the state dict")
        if name in found or not _KNOWN.fullmatch(name) or root != (folder or root):
            raise RefusedError(
                f"it has a member {show(member.filename, 60)} that torch does not write, or has it twice"
            )
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            raise RefusedError("its members are compressed or encrypted, which torch's never are")
        at = member.header_offset
        head = bytes(data[at : at + 30])
        name_length, extra_length = struct.unpack("<HH", head[26:30])
        begin = at + 30 + name_length + extra_length
        if not head.startswith(START) or bytes(data[at + 30 : at + 30 + name_length]) != member.orig_filename.encode():
            raise RefusedError("damaged: a member is not where it is said to be")
        if not 0 <= at - position <= (_MOST_BETWEEN if found else 0) or member.file_size != member.compress_size:
            raise RefusedError("damaged: its members are not one behind the other")
        folder, position = root, begin + member.file_size
        found[name] = (data[begin:position], member.CRC)
    if not 0 <= directory - position <= _MOST_BETWEEN:
        raise RefusedError("damaged: something lies between its members and its directory")
    if "data.pkl" not in found:
        raise RefusedError("it has no data.pkl, so it is no checkpoint of torch")
    return found
