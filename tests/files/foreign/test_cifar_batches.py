"""CIFAR's pickles are read as data: batches of every protocol give their arrays, and no program in them runs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from blto.errors import InputRefused
from blto.files.foreign import cifar_batches, pickles
from blto.files.foreign.cifar_batches import parse_batch, read_cifar

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

    dtype = (
        b"cnumpy\ndtype\nq\x05"
        + string(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
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
    value = {
        "data": pixels(0, 300),
        "labels": list(range(300)),
        "filenames": ["é.png", "b.png"],
        "n": 70_000,
        "x": None,
    }
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


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def entry(body: bytes) -> bytes:
    """A batch whose one entry is given as instructions."""
    return b"\x80\x04}" + text("data") + body + b"s."


def live_payloads(marker: str) -> dict[str, bytes]:
    """Files that make the marker when Python unpickles them."""
    touch, code = f"touch {marker}", f"open({marker!r}, 'w').close()"
    objects = {
        "system": Calls(os.system, touch),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "subprocess": Calls(subprocess.check_call, ["touch", marker]),
        "open": Calls(open, marker, "w"),
        "nested": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
        "map": Calls(list, Calls(map, os.system, [touch])),
        "setstate": Calls(Sets, state=marker),
        "in a list": [0, 1, Calls(os.system, touch)],
    }
    files = {
        f"{name}, protocol {protocol}": pickle.dumps({"data": value}, protocol)
        for name, value in objects.items()
        for protocol in (0, 2, 3, 4, 5)
    }
    run = b"cbuiltins\nexec\n" + text(code) + b"\x85R"
    return files | {
        "GLOBAL": entry(b"cos\nsystem\n" + text(touch) + b"\x85R"),
        "INST": entry(b"(" + text(touch) + b"ios\nsystem\n"),
        "OBJ": entry(b"(cos\nsystem\n" + text(touch) + b"o"),
        "STACK_GLOBAL from the memo": entry(
            text("os") + b"q\x00" + text("system") + b"q\x0100h\x00h\x01\x93" + text(touch) + b"\x85R"
        ),
        "dotted name": entry(text("os") + text("path.os.system") + b"\x93" + text(touch) + b"\x85R"),
        "as a key": b"\x80\x02}" + run + b"Ns.",
        "before the batch": b"\x80\x02" + run + b"0}.",
        "behind a frame": b"\x80\x04\x95" + struct.pack("<Q", len(run) + 3) + run + b"0}.",
    }


@pytest.mark.parametrize("payload", live_payloads("x"))
def test_no_program_runs(tmp_path: Path, payload: str) -> None:
    marker = tmp_path / "PWNED"
    data = live_payloads(str(marker))[payload]
    with pytest.warns(ResourceWarning) if "open" in payload else nullcontext():
        pickle.loads(data)
    assert marker.exists(), "the payload is not one"
    marker.unlink()
    files = contents("cifar100") | {"train": data}
    folder = write_folder(tmp_path, "cifar100", files)
    archive = write_archive(tmp_path / "a.tar.gz", "cifar100", files)
    for call in (
        lambda: parse_batch(data, "train"),
        lambda: read_cifar(folder, "cifar100", "train"),
        lambda: read_cifar(archive, "cifar100", "train"),
    ):
        assert "train: " in refusal(call)
    assert not marker.exists()


def test_the_refusal_says_what_the_file_refers_to() -> None:
    data = pickle.dumps({"data": Calls(os.system, "true")}, 4)
    assert refusal(lambda: parse_batch(data, "a\x1b")).startswith(
        "a\\x1b: it refers to posix.system, which image batches"
    )


NEST = b"K\x00\x85" + b"q\x00h\x00\x86" * 60  # a tuple of two of a tuple of two of ..., 2^60 leaves: never to be walked


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
NDARRAY = RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
ENCODE = b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R"
HOSTILE = {
    "empty": (b"", "damaged"),
    "no stop": (b"\x80\x02}", "damaged"),
    "empty stack": (b"\x80\x02.", "does not end with one value"),
    "two values": (b"\x80\x02}}.", "does not end with one value"),
    "a list": (b"\x80\x02].", "does not hold a mapping"),
    "no mark": (entry(b"t"), "damaged"),
    "no memo": (entry(b"h\x05"), "damaged"),
    "extension": (entry(b"\x82\x01"), "EXT1"),
    "persistent": (entry(b"Pid\n"), "PERSID"),
    "number as text": (entry(b"I" + b"9" * 1000 + b"\n"), "INT"),
    "protocol 5": (pickle.dumps({"data": pixels(0)}, 5), "_frombuffer"),
    "objects": (pickle.dumps({"data": np.array([None, {}], object)}, 2), "calls something"),
    "floats": (pickle.dumps({"data": np.zeros((2, 2))}, 2), "calls something"),
    "scalar": (pickle.dumps({"data": np.float64(1)}, 2), "multiarray.scalar"),
    "three axes": (pickle.dumps({"data": np.zeros((2, 2, 2), np.uint8)}, 2), "not a table"),
    "loader of numpy": (pickle.dumps({"data": Calls(np.load, "a.npy")}, 2), "numpy.load"),
    "array as function": (entry(b"cnumpy\nndarray\nK\x00\x85R"), "calls something"),
    "another class": (entry(NDARRAY.replace(b"ndarray", b"dtype")), "calls something"),
    "state of a list": (entry(b"]Nb"), "sets the state of something"),
    "item of a list": (entry(b"]NNs"), "not a mapping"),
    "append to a mapping": (entry(b"}Na"), "not a list"),
    "number as key": (b"\x80\x02}K\x01K\x02s.", "not a text"),
    "length past the end": (entry(b"B\xff\xff\xff\x7fabc"), "damaged"),
    "nest as module": (entry(NEST + text("x") + b"\x93"), "where a text belongs"),
    "nest as key": (b"\x80\x02}" + NEST + b"Ns.", "not a text"),
    "nest as function": (entry(NEST + b"K\x00\x85R"), "calls something"),
    "nests as arguments": (entry(RECONSTRUCT + NEST + b"q\x00h\x00h\x00\x87R"), "calls something"),
    "nest as codec": (entry(b"c_codecs\nencode\n" + text("a") + NEST + b"\x86R"), "where a text belongs"),
    "nest as state": (entry(NDARRAY + NEST + b"b"), "damaged"),
    "multiplied text": (entry(b"(" + text("a" * 100_000) + b"q\x00" + ENCODE * 3 + b"t"), "more than its own size"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_broken_and_hostile_programs_are_refused(case: str) -> None:
    data, reason = HOSTILE[case]
    assert reason in refusal(lambda: parse_batch(data, "a"))


def test_a_nest_as_a_value_is_left_alone(tmp_path: Path) -> None:
    assert isinstance(parse_batch(entry(NEST), "a")["data"], tuple)
    folder = write_folder(tmp_path, "cifar100", contents("cifar100") | {"train": entry(NEST)})
    assert "not an array" in refusal(lambda: read_cifar(folder, "cifar100", "train"))


def test_an_endless_program_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles.Interpreter, "max_steps", 100)
    assert parse_batch(entry(b"]" + b"Na" * 45), "a")
    assert "longer than image batches ever are" in refusal(lambda: parse_batch(entry(b"]" + b"Na" * 60), "a"))


WATCH = """
import sys
from pathlib import Path
from blto.errors import InputRefused
from blto.files.foreign.cifar_batches import parse_batch, read_cifar
def load(data):
    try:
        parse_batch(data, "a")
    except InputRefused:
        pass
files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
load(files[0])
events = set()
def watch(event, arguments):
    events.add(event)
sys.addaudithook(watch)
for data in files:
    load(data)
assert not events, events
"""


def test_the_interpreter_of_python_sees_nothing_happen(tmp_path: Path) -> None:
    files = [*live_payloads(str(tmp_path / "PWNED")).values(), dump({"data": pixels(0)}), python_2(pixels(0), [1] * 4)]
    (tmp_path / "files").mkdir()
    for number, data in enumerate(files):
        (tmp_path / "files" / str(number)).write_bytes(data)
    subprocess.run([sys.executable, "-c", WATCH, tmp_path / "files"], check=True, timeout=60)
    assert not (tmp_path / "PWNED").exists()


# --- archives ------------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_other_members_are_never_extracted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    members = [
        special("../escape", tarfile.REGTYPE),
        special("/tmp/blto-escape", tarfile.REGTYPE),
        special("link", tarfile.SYMTYPE, "/etc"),
        special("hard", tarfile.LNKTYPE, "link/passwd"),
        special("pipe", tarfile.FIFOTYPE),
    ]
    archive = write_archive(tmp_path / "in" / "a.tar.gz", "cifar100", contents("cifar100"), *members)
    before = sorted(tmp_path.rglob("*"))
    assert len(read_cifar(archive, "cifar100", "train").labels) == 4
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/blto-escape").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_wanted_member_must_be_a_file(tmp_path: Path, kind: bytes) -> None:
    files = contents("cifar100")
    del files["train"]
    member = special("cifar-100-python/train", kind, "/etc/passwd")
    archive = write_archive(tmp_path / "a.tar.gz", "cifar100", files, member)
    assert "train is missing in it, cut short, or not a plain file" in refusal(
        lambda: read_cifar(archive, "cifar100", "train")
    )


def test_bombs_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", "cifar100", contents("cifar100"))
    monkeypatch.setattr(cifar_batches, "_MAX_ARCHIVE_BYTES", 10_000)
    assert "unpacks to more than 10000 bytes" in refusal(lambda: read_cifar(archive, "cifar100", "train"))
    monkeypatch.undo()
    many = [special(str(number), tarfile.REGTYPE) for number in range(200)]
    archive = write_archive(tmp_path / "b.tar.gz", "cifar100", contents("cifar100"), *many)
    assert "missing" in refusal(lambda: read_cifar(archive, "cifar100", "train"))


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b", b"x" * 1000, gzip.compress(b"x" * 5000, mtime=0)])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar.gz").write_bytes(data)
    assert "a.tar.gz: " in refusal(lambda: read_cifar(tmp_path / "a.tar.gz", "cifar10", "train"))
