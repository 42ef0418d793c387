"""Weights and deltas on disk: the safetensors format, with a checksum that the format itself lacks.

Layout: 8 bytes little-endian header length, a JSON header, the tensors' bytes (github.com/huggingface/safetensors,
"Format"). Written here because the library's order of metadata keys varies from run to run; read by the library, which
checks offsets, overlaps and sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from blto.errors import InputRefused
from blto.files.atomic import atomic_write, canonical_json, sha256_bytes
from blto.files.reading import GIB, read_bytes
from blto.files.text import show

Array = npt.NDArray[Any]

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
NAMES = {np.dtype(spelling): name for name, spelling in _DTYPES.items()}
"""How the format spells a type."""
# Our metadata has "blto.format" and "blto.sha256": two keys, so that no single damaged bit can make our file look like
# a foreign one without a checksum. The sum is over the whole file with the sum itself blanked out.
_SLOT, _BLANK = b'"blto.sha256":"', b"0" * 64


def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays of any shape; the same input gives the same bytes.

    Args:
        path: the file.
        tensors: name -> float, integer or bool array.
        metadata: text -> text; keys that start with "blto." are reserved for the checksum.

    Raises:
        ResourceExhausted: as `atomic_write`.
    """
    # Widest types first, as the library does: every tensor then starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    chunks: list[bytes] = []
    end = 0
    for name in names:
        array = tensors[name]
        kind = NAMES[array.dtype.newbyteorder("<")]
        chunk = array.astype(_DTYPES[kind], copy=False).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [end, end + len(chunk)]}
        chunks.append(chunk)
        end += len(chunk)
    header["__metadata__"] = {**metadata, "blto.format": "1", "blto.sha256": _BLANK.decode()}
    encoded = canonical_json(header)
    encoded += b" " * (-len(encoded) % 8)
    data = b"".join([len(encoded).to_bytes(8, "little"), encoded, *chunks])
    atomic_write(path, data.replace(_SLOT + _BLANK, _SLOT + sha256_bytes(data).encode(), 1))


def read_safetensors(path: Path, *, max_bytes: int = 8 * GIB) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and metadata of a safetensors file, ours or a foreign one; bfloat16 is widened to float32.

    Raises:
        InputRefused: CKPT-REFUSED when the structure is broken, a type is unknown, or the checksum does not match.
    """
    return parse_safetensors(read_bytes(path, max_bytes=max_bytes, code="CKPT-REFUSED"), show(path))


def parse_safetensors(data: bytes, name: str) -> tuple[dict[str, Array], dict[str, str]]:
    """As `read_safetensors`, for bytes already in memory; `name` is the file named in messages."""
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]  # it ships no types
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = dict(header.get("__metadata__") or {})
        tensors = {key: _array(entry["dtype"], entry["shape"], entry["data"]) for key, entry in entries}
    except (safetensors.SafetensorError, ValueError, OverflowError, RecursionError) as error:
        raise _refusal(name, show(error, 100)) from error
    if metadata.keys() & {"blto.format", "blto.sha256"}:
        recorded = metadata.pop("blto.sha256", "").encode()
        if not recorded or sha256_bytes(data.replace(_SLOT + recorded, _SLOT + _BLANK, 1)).encode() != recorded:
            raise _refusal(name, "its content does not match the checksum inside it")
        metadata.pop("blto.format", None)
    return tensors, metadata


def _array(kind: str, shape: list[int], data: bytes) -> Array:
    if kind == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    if kind not in _DTYPES:
        raise ValueError(f"tensors of type {kind} are not supported")
    return np.frombuffer(data, _DTYPES[kind]).reshape(shape)


def _refusal(name: str, reason: str) -> InputRefused:
    return InputRefused(
        f"{name}: not an intact safetensors file ({reason}). Restore it or make it again.", code="CKPT-REFUSED"
    )
