"""torch's checkpoints from before 1.6 (and `_use_new_zipfile_serialization=False`): four pickles, then raw storages.

Read by the same interpreter that runs nothing; `sandbox` is the one caller, in a process of its own.
"""

from __future__ import annotations

import io
from typing import Any

from blto.files.foreign.groups import grouped
from blto.files.foreign.pickles import Interpreter, RefusedError, as_text
from blto.files.foreign.weights import Tensor, Weights

START = b"\x80"
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


class LegacyCheckpoint:
    """An opened legacy checkpoint; as `zipped.ZipCheckpoint`.

    Raises:
        RefusedError: anything but what torch wrote.
        Exception: of any kind, for a damaged file.
    """

    def __init__(self, data: bytes) -> None:
        stream = io.BytesIO(data)
        if Interpreter().run(stream) != MAGIC or Interpreter().run(stream) != VERSION:
            raise RefusedError("it is a pickle, but none of torch's checkpoints")
        system = Interpreter().run(stream)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise RefusedError("its numbers are not little-endian")
        weights = Weights()
        value = weights.run(stream)
        keys = Interpreter().run(stream)
        if type(keys) is not list or {as_text(key) for key in keys} != weights.storages.keys():
            raise RefusedError("it does not list the storages that it uses")
        self._places: dict[str, memoryview] = {}
        position, view = stream.tell(), memoryview(data)
        for key in map(as_text, keys):
            storage = weights.storages[key]
            if int.from_bytes(view[position : position + 8], "little") != storage.numel or key in self._places:
                raise RefusedError("it has a storage of another size than it says")
            position += 8
            self._places[key] = view[position : position + storage.nbytes]
            position += storage.nbytes
        if position != len(data):
            raise RefusedError("it is cut short, or something follows it")
        self.groups = grouped(value, len(data))

    def take(self, tensor: Tensor) -> Any:
        """The tensor's numbers."""
        return tensor.taken_from(self._places[tensor.storage.key])
