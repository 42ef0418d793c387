"""Checkpoints of other programs as plain arrays: safetensors, torch's zip files, and torch's legacy pickles.

`torch.load` is never called, not even with `weights_only=True`: malformed files have made it read out of bounds or run
code, release after release. What a file is, its first bytes say, not its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy.typing as npt

from blto.errors import InputRefused
from blto.files.atomic import sha256_bytes
from blto.files.foreign import legacy, sandbox, zipped
from blto.files.foreign.pickles import RefusedError
from blto.files.reading import GIB, read_bytes
from blto.files.safetensors import parse_safetensors
from blto.files.text import show

Array = npt.NDArray[Any]
CODE = "CKPT-REFUSED"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file.

    Attributes:
        name: of the file, for messages.
        format: "safetensors", "torch zip" or "torch legacy".
        sha256: of the bytes that were parsed.
        groups: dotted path of a mapping inside the file ("state_dict", "" for the whole) -> name -> shape.
        layers: what held the process that read it, where that was one of its own.
    """

    name: str
    format: str
    sha256: str
    groups: Mapping[str, Mapping[str, tuple[int, ...]]]
    layers: tuple[str, ...]
    _take: Callable[[str], Mapping[str, Array]] = field(repr=False)

    def arrays(self, group: str) -> dict[str, Array]:
        """The arrays of one group; bfloat16 is widened to float32.

        Raises:
            InputRefused: CKPT-REFUSED, where a tensor's bytes are damaged.
        """
        try:
            return dict(self._take(group))
        except RefusedError as error:
            refuse(self.name, error)


def read_checkpoint(path: Path, *, max_bytes: int = 8 * GIB) -> Checkpoint:
    """Open a checkpoint of any of the three formats. The file is read once, so what is hashed is what is parsed.

    Args:
        path: the file.
        max_bytes: a larger one is refused.

    Raises:
        InputRefused: CKPT-REFUSED: not a checkpoint, damaged, or holding anything but dense tensors of numbers beside
            plain data; nothing in it was run.
    """
    data = read_bytes(path, max_bytes=max_bytes, code=CODE)
    name, digest = show(path), sha256_bytes(data)
    if data.startswith(zipped.START):
        opened = _opened(name, data)
        shapes = {group: {key: tensor.shape for key, tensor in of.items()} for group, of in opened.groups.items()}
        return Checkpoint(name, "torch zip", digest, shapes, (), opened.arrays)
    if data[8:9] == b"{":  # asked first: the length before it may begin as a pickle does
        flat, _ = parse_safetensors(data, name)
        if not flat:
            refuse(name, RefusedError("it holds no tensor"))
        return _held(name, "safetensors", digest, {"": flat})
    if data.startswith(legacy.START):
        try:
            groups, layers = sandbox.convert(data)
        except RefusedError as error:
            refuse(name, error)
        return _held(name, "torch legacy", digest, groups, layers)
    refuse(name, RefusedError("neither safetensors nor a checkpoint of torch"))


def _opened(name: str, data: bytes) -> zipped.ZipCheckpoint:
    try:
        return zipped.ZipCheckpoint(data)
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive or pickle can fail in any way
        refuse(name, error)


def _held(
    name: str, kind: str, digest: str, groups: Mapping[str, Mapping[str, Array]], layers: tuple[str, ...] = ()
) -> Checkpoint:
    """A checkpoint whose arrays are in memory already."""
    shapes = {group: {key: array.shape for key, array in of.items()} for group, of in groups.items()}
    return Checkpoint(name, kind, digest, shapes, layers, groups.__getitem__)


def refuse(name: str, reason: Exception) -> NoReturn:
    """Raise the one line that says why a file is refused."""
    said = show(str(reason), 140) if isinstance(reason, RefusedError) else f"damaged ({show(reason, 80)})"
    advice = "Nothing was loaded. Ask its author for a .safetensors file."
    raise InputRefused(f"{name}: {said}. {advice}", code=CODE) from reason
