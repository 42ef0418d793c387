"""CIFAR-10 and CIFAR-100 in their original form: Python pickles, read without running them.

The one class that such a pickle may name is NumPy's array, which is recognised by its pattern and built here from the
bytes. Anything else is refused before it can have an effect.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from blto.errors import InputRefused
from blto.files.foreign.pickles import Global, Interpreter, RefusedError, as_text
from blto.files.reading import open_regular, read_bytes
from blto.files.text import show

CODE = "PICKLE-REFUSED"
_MAX_BATCH_BYTES = 256 << 20  # CIFAR-100's training file, the largest, has 155 MB
_MAX_ARCHIVE_BYTES = 512 << 20  # unpacked; both archives have about 186 MB
_MAX_MEMBERS = 100  # the archives have about 10
_SHAPE, _PIXELS = (3, 32, 32), 3 * 32 * 32


class CifarImages(NamedTuple):
    """One split: images uint8 (N, 3, 32, 32), labels int64 (N,), and the class names in label order."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]


class _Layout(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str


_FIVE = tuple(f"data_batch_{number}" for number in range(1, 6))
_LAYOUTS = {
    "cifar10": _Layout("cifar-10-batches-py", _FIVE, ("test_batch",), "batches.meta", "labels", "label_names"),
    "cifar100": _Layout("cifar-100-python", ("train",), ("test",), "meta", "fine_labels", "fine_label_names"),
}


def read_cifar(source: Path, name: Literal["cifar10", "cifar100"], split: Literal["train", "test"]) -> CifarImages:
    """Read one split from the .tar.gz, from its unpacked folder, or from the folder that holds that one.

    Raises:
        InputRefused: PICKLE-REFUSED naming the file: missing, damaged, or holding anything but image batches.
    """
    layout = _LAYOUTS[name]
    batches = layout.train if split == "train" else layout.test
    files = _read_folder(source, layout, batches) if source.is_dir() else _read_archive(source, layout, batches)
    meta = parse_batch(files[layout.meta], f"{source}/{layout.meta}")
    names = meta.get(layout.names)
    if not isinstance(names, list) or not names or not all(isinstance(entry, str) for entry in names):
        raise _refusal(f"{source}/{layout.meta}", f'it has no list "{layout.names}"')
    parts = [_split_part(files[batch], f"{source}/{batch}", layout.labels, len(names)) for batch in batches]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return CifarImages(images, labels, tuple(names))


def parse_batch(data: bytes, name: str) -> dict[str, Any]:
    """The mapping in a pickled batch: texts, numbers, lists and uint8 arrays; `bytes` keys and texts become `str`.

    Protocols 2 to 4 are read, from Python 2 or 3. `name` is the file named in messages.

    Raises:
        InputRefused: PICKLE-REFUSED; nothing in the file has been run.
    """
    try:
        value = _Batches(len(data)).run(data)
        if type(value) is not dict:
            raise RefusedError("it does not hold a mapping")
    except Exception as error:  # a damaged program can fail in any way: an empty stack, a missing memo, a bad length
        raise _refusal(name, error) from error
    return {as_text(key): _plain(entry) for key, entry in value.items()}


def _split_part(data: bytes, name: str, label_key: str, classes: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    batch = parse_batch(data, name)
    images, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != _PIXELS:
        raise _refusal(name, 'its "data" is not an array of 32x32 images')
    if not isinstance(labels, list) or len(labels) != len(images):
        raise _refusal(name, f'its "{label_key}" is not a list of {len(images)} labels')
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise _refusal(name, f"its labels are not all from 0 to {classes - 1}")
    return images.reshape(-1, *_SHAPE), np.asarray(labels, np.int64)


def _read_folder(source: Path, layout: _Layout, batches: tuple[str, ...]) -> dict[str, bytes]:
    folder = source / layout.folder if (source / layout.folder).is_dir() else source
    return {name: read_bytes(folder / name, max_bytes=_MAX_BATCH_BYTES, code=CODE) for name in (*batches, layout.meta)}


def _read_archive(source: Path, layout: _Layout, batches: tuple[str, ...]) -> dict[str, bytes]:
    """Take the wanted members by their exact names, into memory; nothing is ever extracted to the disk."""
    names = (*batches, layout.meta)
    with open_regular(source, code=CODE) as file:
        try:
            unpacked = gzip.GzipFile(fileobj=file).read(_MAX_ARCHIVE_BYTES + 1)
            if len(unpacked) > _MAX_ARCHIVE_BYTES:
                raise RefusedError(f"it unpacks to more than {_MAX_ARCHIVE_BYTES} bytes")
            with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
                members = {member.name: member for member in islice(archive, _MAX_MEMBERS)}
                return {name: _read_member(archive, members.get(f"{layout.folder}/{name}"), name) for name in names}
        except Exception as error:  # tarfile and gzip meet damage with several kinds of exception
            raise _refusal(str(source), error) from error


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo | None, name: str) -> bytes:
    content = archive.extractfile(member) if member and member.isreg() and not member.issparse() else None
    data = content.read() if content else b""
    if not member or not data or len(data) != member.size:
        raise RefusedError(f"{name} is missing in it, cut short, or not a plain file")
    return data


class _Array:
    """Stands for an array between `_reconstruct` and the state that fills it."""

    value: npt.NDArray[np.uint8] | None = None


_RECONSTRUCT = {Global(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
_NDARRAY, _DTYPE, _ENCODE = Global("numpy", "ndarray"), Global("numpy", "dtype"), Global("_codecs", "encode")
_GLOBALS = {*_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE}
_U1 = object()
"""Stands for the one accepted dtype."""


class _Batches(Interpreter):
    needed_by = "image batches"

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def named(self, reference: Global) -> Global:
        return reference if reference in _GLOBALS else super().named(reference)

    def called(self, function: Any, arguments: Any) -> Any:
        # The type is asked first: comparing or hashing a hostile nest of tuples may never end.
        known = function if isinstance(function, Global) else None
        if known in _RECONSTRUCT and len(arguments) == 3 and arguments[:2] == (_NDARRAY, (0,)):
            return _Array()
        if known == _DTYPE and len(arguments) == 3 and as_text(arguments[0]) == "u1":
            return _U1
        if known == _ENCODE and len(arguments) == 2 and as_text(arguments[1]) == "latin1":
            return self.encode(arguments[0])
        return super().called(function, arguments)

    def encode(self, text: Any) -> bytes:
        """Bytes that Python 2, or protocol 2, spelled as Latin-1 text; each may be spelled once, not multiplied."""
        self.room -= len(text)
        if self.room < 0:
            raise RefusedError("it unpacks to more than its own size")
        return as_text(text).encode("latin-1")

    def filled(self, target: Any, state: Any) -> None:
        if isinstance(target, _Array):
            target.value = self.array(state)
        elif target is not _U1:  # a dtype's state (byte order, alignment) says nothing about single bytes
            super().filled(target, state)

    def array(self, state: Any) -> npt.NDArray[np.uint8]:
        _, shape, dtype, fortran_order, data = state
        raw = self.encode(data) if isinstance(data, str) else data
        if dtype is not _U1 or not isinstance(raw, bytes):
            raise RefusedError("its array is not one of unsigned bytes")
        if len(shape) != 2 or not all(type(size) is int and 0 <= size <= len(raw) for size in shape):
            raise RefusedError("its array is not a table of images")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order is True else "C")


def _plain(value: Any) -> Any:
    """One entry of the mapping: arrays in place of what stands for them, text in place of bytes, one level deep."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, list):
        return [as_text(entry) if isinstance(entry, bytes) else entry for entry in value]
    return as_text(value) if isinstance(value, bytes) else value


def _refusal(name: str, reason: str | Exception) -> InputRefused:
    if isinstance(reason, Exception) and not isinstance(reason, RefusedError):
        reason = f"damaged ({show(reason, 80)})"
    return InputRefused(f"{show(name)}: {reason}. Download CIFAR again from its authors.", code=CODE)
