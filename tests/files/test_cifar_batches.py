"""CIFAR's pickles are read as data: batches of every protocol give their arrays, and no program in them runs."""

from __future__ import annotations

import builtins
import functools
import io
import operator
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from blto.errors import InputRefused
from blto.files import cifar_batches
from blto.files.cifar_batches import parse_batch, read_cifar

Name = Literal["cifar10", "cifar100"]
NAMES = [f"class {number}" for number in range(10)]
FILES: dict[Name, tuple[str, list[str], list[str], str, str, str]] = {
    "cifar10": (
        "cifar-10-batches-py",
        [f"data_batch_{number}" for number in range(1, 6)],
        ["test_batch"],
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": ("cifar-100-python", ["train"], ["test"], "meta", "fine_labels", "fine_label_names"),
}


def pixels(seed: int, count: int = 4) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def dump(value: dict[str, Any], protocol: int = 2, as_bytes: bool = False) -> bytes:
    """A batch as Python 3 writes it; `as_bytes`: with every text as bytes, as a converted Python 2 file has."""

    def text(entry: Any) -> Any:
        if isinstance(entry, list):
            return [text(part) for part in entry]
        return entry.encode() if as_bytes and isinstance(entry, str) else entry

    return pickle.dumps({text(key): text(entry) for key, entry in value.items()}, protocol)


def python_2(images: npt.NDArray[np.uint8], labels: list[int]) -> bytes:
    """A batch as Python 2 wrote the published ones: protocol 2, with `str` in place of bytes and texts."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text

    dtype = b"cnumpy\ndtype\nq\x05" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R(K\x01"
    array += b"K" + bytes([len(images)]) + b"M\x00\x0c\x86" + dtype + b"\x89" + string(images.tobytes()) + b"tb"
    numbers = b"]q\x07(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + string(b"data") + array + string(b"labels") + numbers + b"u."


def contents(name: Name) -> dict[str, bytes]:
    """The files of a small CIFAR, by name."""
    _, train, test, meta, label_key, names_key = FILES[name]
    files = {meta: dump({names_key: NAMES, "num_vis": 3072})}
    for seed, batch in enumerate(train + test):
        value = {"batch_label": batch, label_key: [seed, 9, 0, 3], "data": pixels(seed), "filenames": ["a.png"] * 4}
        files[batch] = dump(value, protocol=2 + seed % 3, as_bytes=seed % 2 == 1)
    return files


def write_folder(root: Path, name: Name, files: dict[str, bytes]) -> Path:
    folder = root / FILES[name][0]
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


def write_archive(path: Path, name: Name, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in more:
            archive.addfile(member)
        for file, data in files.items():
            member = tarfile.TarInfo(f"{FILES[name][0]}/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputRefused) as error:
        call()
    assert error.value.code == "PICKLE-REFUSED"
    assert len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_of_python_3_are_read(protocol: int, as_bytes: bool) -> None:
    value = {"data": pixels(0, 300), "labels": list(range(300)), "filenames": ["é.png", "b.png"], "n": 70_000, "x": None}
    batch = parse_batch(dump(value, protocol, as_bytes), "a")
    np.testing.assert_array_equal(batch.pop("data"), value.pop("data"))
    assert batch.pop("filenames")[1] == "b.png"
    del value["filenames"]
    assert batch == value


def test_batches_of_python_2_are_read() -> None:
    data = python_2(pixels(0), [3, 1, 4, 1])
    assert pickle.loads(data, encoding="latin1")["labels"] == [3, 1, 4, 1]  # it is one that Python itself accepts
    batch = parse_batch(data, "a")
    np.testing.assert_array_equal(batch["data"], pixels(0))
    assert batch["labels"] == [3, 1, 4, 1]


def test_column_order_is_kept() -> None:
    table = np.asfortranarray(pixels(0))
    np.testing.assert_array_equal(parse_batch(dump({"data": table}), "a")["data"], table)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("source", ["archive", "folder", "parent"])
def test_both_data_sets_are_read_from_every_source(tmp_path: Path, name: Name, source: str) -> None:
    if source == "archive":
        path = write_archive(tmp_path / "a.tar.gz", name, contents(name))
    else:
        path = write_folder(tmp_path, name, contents(name))
        path = tmp_path if source == "parent" else path
    train, test = read_cifar(path, name, "train"), read_cifar(path, name, "test")
    batches = len(FILES[name][1])
    expected = np.concatenate([pixels(seed) for seed in range(batches)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(train.images, expected)
    np.testing.assert_array_equal(test.images, pixels(batches).reshape(-1, 3, 32, 32))
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == [label for seed in range(batches) for label in (seed, 9, 0, 3)]
    assert test.labels.tolist() == [batches, 9, 0, 3]
    assert train.class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"data": pixels(0)}, "not a list of 4 labels"),
        ({"data": pixels(0), "fine_labels": [0, 1, 2]}, "not a list of 4 labels"),
        ({"data": pixels(0), "fine_labels": [0, 1, 2, 10]}, "not all from 0 to 9"),
        ({"data": pixels(0), "fine_labels": [0, 1, 2, -1]}, "not all from 0 to 9"),
        ({"data": pixels(0), "fine_labels": [0, 1, 2, True]}, "not all from 0 to 9"),
        ({"data": pixels(0)[:, :100], "fine_labels": [0] * 4}, "not an array of 32x32 images"),
        ({"data": [1, 2], "fine_labels": [0, 1]}, "not an array of 32x32 images"),
        ({"fine_labels": []}, "not an array of 32x32 images"),
    ],
)
def test_batches_that_make_no_images_are_refused(tmp_path: Path, value: dict[str, Any], reason: str) -> None:
    files = contents("cifar100") | {"train": dump(value)}
    folder = write_folder(tmp_path, "cifar100", files)
    message = refusal(lambda: read_cifar(folder, "cifar100", "train"))
    assert reason in message
    assert message.startswith(f"{folder}/train: ")


@pytest.mark.parametrize("names", [None, [], ["a", 1], "abc"])
def test_damaged_class_names_are_refused(tmp_path: Path, names: object) -> None:
    folder = write_folder(tmp_path, "cifar100", contents("cifar100") | {"meta": dump({"fine_label_names": names})})
    assert "meta: " in refusal(lambda: read_cifar(folder, "cifar100", "test"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    files = contents("cifar100")
    del files["test"]
    folder = write_folder(tmp_path, "cifar100", files)
    archive = write_archive(tmp_path / "a.tar.gz", "cifar100", files)
    assert "cifar-100-python/test: cannot be opened" in refusal(lambda: read_cifar(folder, "cifar100", "test"))
    assert "test is missing in it" in refusal(lambda: read_cifar(archive, "cifar100", "test"))
    assert "absent: cannot be opened" in refusal(lambda: read_cifar(tmp_path / "absent", "cifar100", "test"))


# --- hostile files -------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call, as hostile files do."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


class Sets:
    """An object whose state is set by its own method."""

    def __setstate__(self, state: str) -> None:
        Path(state).touch()


def raw(body: bytes, protocol: int = 4) -> bytes:
    """A batch with one entry, given as instructions."""
    return b"\x80" + bytes([protocol]) + b"}U\x04data" + body + b"s."


def live_payloads(marker: str) -> dict[str, bytes]:
    """Files that make the marker when they are unpickled."""
    touch = f"touch {marker}"
    code = f"open({marker!r}, 'w').close()"
    command, source = touch.encode(), code.encode()
    setter = Sets()
    setter.path = marker  # type: ignore[attr-defined]
    objects = {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "subprocess": Calls(subprocess.check_call, ["touch", marker]),
        "open": Calls(open, marker, "w"),
        "nested": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
        "getattr chain": Calls(Calls(getattr, Calls(__import__, "os"), "system"), touch),
        "partial": Calls(Calls(functools.partial, os.system), touch),
        "methodcaller": Calls(Calls(operator.methodcaller, "system", touch), os),
        "map": Calls(list, Calls(map, os.system, [touch])),
        "state": Calls(Sets, state=marker),
        "array state": Calls(np.ndarray, (0,), state=(1, (1,), np.dtype("O"), False, [Calls(os.system, touch)])),
        "label": [0, 1, Calls(os.system, touch)],
    }
    files = {f"{name} {protocol}": pickle.dumps({"data": value}, protocol) for name, value in objects.items() if name not in ("methodcaller", "array state") for protocol in (2, 3, 4)}
    return files | {
        "GLOBAL": raw(b"cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R", 2),
        "INST": raw(b"(X" + struct.pack("<I", len(command)) + command + b"ios\nsystem\n", 2),
        "OBJ": raw(b"(cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"o", 2),
        "STACK_GLOBAL memo": raw(b"\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93X" + struct.pack("<I", len(command)) + command + b"\x85R"),
        "protocol 0": b"(dS'data'\ncbuiltins\nexec\n(V" + source + b"\ntRs.",
        "key": b"\x80\x02}cbuiltins\nexec\nX" + struct.pack("<I", len(source)) + source + b"\x85RNs.",
        "before": b"\x80\x02cbuiltins\nexec\nX" + struct.pack("<I", len(source)) + source + b"\x85R0}.",
        "dotted": raw(b"\x8c\x02os\x8c\x0bpath.os.sys\x930\x8c\x02os\x8c\x0epath.os.system\x93X" + struct.pack("<I", len(command)) + command + b"\x85R"),
    }
