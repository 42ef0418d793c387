"""torch's zip checkpoints (`torch.save` since 1.6), read without running anything and without unpacking anything.

Accepted is what torch writes: members stored and not compressed, in one folder, one `data.pkl`, storages `data/<key>`,
each with the right CRC-32 (which `torch.load` does not look at). An archive with code (TorchScript) is refused by name.
"""

from __future__ import annotations

import io
import re
import zipfile
from typing import Any

from blto.files.foreign.pickles import RefusedError
from blto.files.foreign.weights import Storage, Tensor, Weights, grouped, storage_of
from blto.files.text import show

START = b"PK\x03\x04"
MAX_INDEX_BYTES = 64 << 20
_KNOWN = re.compile(
    r"data\.pkl|data/\w+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
_ENCRYPTED = 0x1


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
        self._archive = zipfile.ZipFile(io.BytesIO(data))
        self._root, self._sizes = self._checked(len(data))
        if self._sizes["data.pkl"] > MAX_INDEX_BYTES:
            raise RefusedError(f"its index is larger than {MAX_INDEX_BYTES:,} bytes")
        if "byteorder" in self._sizes and self._read("byteorder") != b"little":
            raise RefusedError("its numbers are big-endian; save it again on an ordinary machine")
        self.groups = grouped(Weights(self._storage).run(self._read("data.pkl")), len(data))
        self._held: tuple[str, bytes] = ("", b"")

    def take(self, tensor: Tensor) -> Any:
        """The tensor's numbers, from its storage, whose CRC-32 is checked."""
        if self._held[0] != tensor.storage.key:
            self._held = (tensor.storage.key, self._read(f"data/{tensor.storage.key}"))
        return tensor.taken_from(self._held[1])

    def _checked(self, file_size: int) -> tuple[str, dict[str, int]]:
        """The archive's one folder, and the size of each member by its name inside it."""
        members = self._archive.infolist()
        roots = {member.filename.partition("/")[0] for member in members}
        if len(roots) != 1:
            raise RefusedError("it is no archive of torch: its members are not in one folder")
        (root,) = roots
        sizes: dict[str, int] = {}
        for member in members:
            name = member.filename.partition("/")[2]
            if name.startswith("code/") or name == "constants.pkl":
                raise RefusedError("it is a TorchScript archive, which holds code; ask for the state dict")
            if name in sizes or not _KNOWN.fullmatch(name):
                raise RefusedError(f"it has a member {show(name, 60)} that torch does not write, or has it twice")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
                raise RefusedError("its members are compressed or encrypted, which torch's never are")
            sizes[name] = member.file_size
        if min(member.header_offset for member in members) != 0 or sum(sizes.values()) > file_size:
            raise RefusedError("its members are not where or what they are said to be")
        if "data.pkl" not in sizes:
            raise RefusedError("it has no data.pkl, so it is no checkpoint of torch")
        return root, sizes

    def _read(self, name: str) -> bytes:
        return self._archive.read(f"{self._root}/{name}")

    def _storage(self, identity: tuple[Any, ...]) -> Storage:
        storage = storage_of(identity)
        if self._sizes.get(f"data/{storage.key}", -1) < storage.nbytes:
            raise RefusedError("it has a tensor whose bytes are missing or cut short")
        return storage
