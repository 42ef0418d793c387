"""Checkpoints that would run code, fill the memory, or be two files at once."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.files.foreign.made import (
    Call,
    contents,
    in_legacy,
    in_zip,
    named,
    read,
    refusal,
    saved,
    tensor_program,
    training,
)


def payloads(marker: str) -> dict[str, bytes]:
    """Pickles that would leave the marker, or hand the reader something that is no tensor."""
    shell, code = f"touch {marker}", f"open({marker!r}, 'w')"
    unicode = b"X" + struct.pack("<I", len(shell)) + shell.encode()
    made: dict[str, bytes] = {
        "system": pickle.dumps(Call(os.system, shell), 2),
        "system, protocol 4": pickle.dumps(Call(os.system, shell), 4),
        "popen": pickle.dumps(Call(subprocess.Popen, ["touch", marker]), 2),
        "eval": pickle.dumps(Call(eval, code), 2),
        "exec": pickle.dumps(Call(exec, code), 2),
        "compile": pickle.dumps(Call(compile, code, "x", "exec"), 2),
        "open": pickle.dumps(Call(open, marker, "w"), 2),
        "import": pickle.dumps(Call(__import__, "os"), 2),
        "getattr": pickle.dumps(Call(getattr, "", "join"), 2),
        "a pickle inside": pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.system, shell))), 2),
        "in a mapping": pickle.dumps({"a": [Call(os.system, shell)]}, 2),
        "inst": b"(" + unicode + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + unicode + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n" + unicode + b"\x85\x81.",
        "newobj_ex": b"\x80\x04cos\nsystem\n" + unicode + b"\x85}\x92.",
        "extension": b"\x80\x02\x82\x01" + unicode + b"\x85R.",
        "build with a setter": b"\x80\x02ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",
        "stack global from the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93" + unicode + b"\x85R.",
        "persistent": b"\x80\x02cos\nsystem\n" + unicode + b"\x85RQ.",
        "persistent text": b"Pos.system\n.",
        "protocol 0": f"cos\nsystem\n(S'{shell}'\ntR.".encode(),
        "buffer": b"\x80\x05\x97.",
        "a subclass of tensor": named("torch._tensor", "_rebuild_from_type_v2", "x"),
    }
    for module, name in (
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch._utils", "_rebuild_nested_tensor"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.hub", "load"),
        ("torch.utils.collect_env", "run"),
        ("torch.serialization", "load"),
        ("numpy", "load"),
        ("builtins", "exec"),
        ("transformers", "AutoModel.from_pretrained"),
    ):
        made[f"{module}.{name}"] = named(module, name, shell)
    return made


NAMES = sorted(payloads("x"))


def beside_a_tensor(program: bytes) -> bytes:
    """An index that holds one good tensor, and what the program makes."""
    head = tensor_program(0, (4,), (1,))[:-2]
    return head + b"sX\x01\x00\x00\x00x" + program.removeprefix(b"\x80\x02")[:-1] + b"s."


@pytest.mark.parametrize("name", NAMES)
def test_no_payload_is_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "PWNED"
    program = payloads(str(marker))[name]
    assert contents(read(tmp_path, in_zip(beside_a_tensor(b"\x80\x02N."))))
    assert "nothing was run" in refusal(tmp_path, in_zip(beside_a_tensor(program)))
    refusal(tmp_path, program)
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES[::4])
def test_no_payload_is_run_in_a_legacy_file(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "PWNED"
    refusal(tmp_path, in_legacy(payloads(str(marker))[name]))
    assert not marker.exists()


def test_only_a_set_is_added_to(tmp_path: Path) -> None:
    assert "it adds to what is not a set" in refusal(tmp_path, in_zip(beside_a_tensor(b"\x80\x02](N\x90.")))


def test_a_payload_is_named(tmp_path: Path) -> None:
    for data in (in_zip(pickle.dumps(Call(os.system, "x"), 2)), in_legacy(pickle.dumps(Call(os.system, "x"), 2))):
        assert "it refers to posix.system, which weights never need; nothing was run" in refusal(tmp_path, data)


def two_directories() -> bytes:
    """One file in which readers that look for the directory elsewhere find other weights."""
    parts = []
    for value in (1.0, 666.0):
        whole = saved({"w": torch.full((4,), value)})
        at = struct.unpack("<I", whole[-6:-2])[0]
        parts.append((whole[:at], whole[at:-22], whole[-22:]))
    (first, directory, end), (second, other, _) = parts
    return second + first + directory + end[:-2] + struct.pack("<H", len(other)) + other


def with_a_gap(*, behind: str) -> bytes:
    """A zip checkpoint with bytes that no directory knows behind one of its members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in {"data.pkl": tensor_program(0, (4,), (1,)), "data/0": bytes(64)}.items():
            archive.writestr(f"x/{name}", data)
            if name == behind:
                archive.start_dir += 64
    return stream.getvalue()


def test_no_other_reader_can_see_another_file_in_the_same_bytes(tmp_path: Path) -> None:
    whole = saved({"w": torch.ones(4)})
    at = struct.unpack("<I", whole[-6:-2])[0]
    other_case = in_zip(tensor_program(0, (4,), (1,), key="a"), **{"data/a": bytes(64), "data/A": bytes(64)})
    for wrong, why in (
        (two_directories(), "does not end as torch's files do"),
        (whole + b"x", "does not end as torch's files do"),
        (whole[:-2] + b"\x01\x00x", "does not end as torch's files do"),
        (whole[:-2] + b"\x01\x00", "does not end as torch's files do"),
        (whole[:at] + bytes(64) + whole[at:], "its directory is not where it is said to be"),
        (whole[:-22] + bytes(64) + whole[-22:], "its directory is not where it is said to be"),
        (b"PK\x03\x04" + bytes(60) + whole, "its directory is not where it is said to be"),
        (with_a_gap(behind="data.pkl"), "not one behind the other"),
        (with_a_gap(behind="data/0"), "between its members and its directory"),
        (_twice(), "or has it twice"),
        (other_case, "that torch does not write"),
    ):
        assert why in refusal(tmp_path, wrong)


LIMITED = """
import resource, sys
from pathlib import Path
from blto.errors import InputRefused
from blto.files.foreign.checkpoints import read_checkpoint
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for file in sys.argv[1:]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 8, resource.RLIM_INFINITY))
    try:
        found = read_checkpoint(Path(file))
        print(file, sum(len(found.arrays(group)) for group in found.groups))
    except InputRefused as error:
        print(file, error)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print("whole", int(peak.split()[1]) < 400_000)
"""


def test_no_file_takes_more_time_or_memory_than_it_should(tmp_path: Path) -> None:
    """What a first reader of this code found to blow up, and the bombs above."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    key = text("k" * 500)
    colliding = b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 20_000))
    often = b"".join(text(str(number)) + b"h\x01" for number in range(200_000))
    large, little = torch.ones(5_000_000), torch.ones(1)
    bombs = {
        "one mapping often": in_zip(b"\x80\x02}" + key + b"](}q\x00" + b"h\x00" * 500_000 + b"es."),
        "colliding keys": in_zip(b"\x80\x02}(" + colliding + b"u."),
        "many dimensions": in_zip(tensor_program(0, (1,) * 40_000, (1,) * 40_000)),
        "alternating": saved({str(n): large[n : n + 1] if n % 2 else little[:1] for n in range(400)}),
        "one tensor often": in_zip(tensor_program(0, (1,), (1,))[:-2] + b"q\x01s(" + often + b"u."),
        "many steps": in_zip(b"\x80\x02" + b"}" * 3_000_000 + b"."),
        "nested": in_zip(nest(100_000)),
        "laughs": in_zip(LAUGHS),
        "compressed": _compressed(),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    given = [sys.executable, "-c", LIMITED, *(str(tmp_path / name) for name in bombs)]
    done = subprocess.run(given, check=False, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (len(lines), lines[-1:]) == (len(bombs) + 1, ["whole True"]), done.stderr


def nest(depth: int) -> bytes:
    return b"\x80\x02" + b"(" * depth + b"t" * depth + b"."


LAUGHS = b"\x80\x02}" + b"".join(
    b"X\x01\x00\x00\x00"
    + bytes([65 + k])
    + b"]("
    + (b"h" + bytes([max(0, k - 1)])) * 10 * bool(k)
    + b"eq"
    + bytes([k])
    + b"s"
    for k in range(60)
)


LAUGHS += b"."


BOMBS: dict[str, Callable[[], bytes]] = {
    "compressed": lambda: _compressed(),
    "nested tuples": lambda: in_zip(nest(100_000)),
    "nested mappings": lambda: in_zip(b"\x80\x02" + b"}U\x01a" * 100_000 + b"N" + b"s" * 100_000 + b"."),
    "a list of itself": lambda: in_zip(b"\x80\x02]q\x00h\x00a."),
    "laughs": lambda: in_zip(LAUGHS),
    "a huge text that is not there": lambda: in_zip(b"\x80\x02X\xff\xff\xff\x7fa."),
    "a huge memo": lambda: in_zip(b"\x80\x02}r\xff\xff\xff\x7f."),
    "views of the same bytes": lambda: _aliases(),
    "two indices": lambda: _twice(),
    "a member of code": lambda: in_zip(b"\x80\x02}.", **{"code/x.py": b"x"}),
    "constants": lambda: in_zip(b"\x80\x02}.", **{"constants.pkl": b"x"}),
    "an unknown member": lambda: in_zip(b"\x80\x02}.", **{"../../x": b"x"}),
    "something before it": lambda: b"PK\x03\x04junk" + saved({"a": torch.ones(1)}),
    "no index": lambda: _without_index(),
    "big-endian": lambda: in_zip(tensor_program(0, (1,), (1,)), byteorder=b"big"),
    "no tensor": lambda: saved({"epoch": 1}),
    "a tensor alone": lambda: saved(torch.ones(2)),
    "empty": lambda: b"",
    "an image": lambda: b"\x89PNG\r\n\x1a\n" + bytes(99),
    "a text": lambda: b"weights",
    "half a zip": lambda: saved(training())[:500],
    "half a legacy file": lambda: saved(training(), legacy=True)[:-4],
    "more than a legacy file": lambda: saved(training(), legacy=True) + b"x",
    "another pickle": lambda: pickle.dumps({"a": 1}, 2),
    "sparse": lambda: saved({"a": torch.eye(3).to_sparse()}),
    "quantised": lambda: saved({"a": torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)}),
    "complex": lambda: saved({"a": torch.ones(1, dtype=torch.complex64)}),
    "a whole module": lambda: saved(torch.nn.Linear(1, 1)),
}


def _compressed() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", tensor_program(0, (4,), (1,)))
        archive.writestr("x/data/0", bytes(10**8))
    return stream.getvalue()


def _aliases() -> bytes:
    whole = torch.zeros(1000)
    return saved({str(number): whole.view(1000) for number in range(500)})


def _twice() -> bytes:
    stream = io.BytesIO(in_zip(tensor_program(0, (1,), (1,))))
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data.pkl", b"\x80\x02}.")
    return stream.getvalue()


def _without_index() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/version", b"3\n")
    return stream.getvalue()


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning", "ignore:.*deprecated:DeprecationWarning")
def test_bombs_and_strangers_are_refused(tmp_path: Path, name: str) -> None:
    refusal(tmp_path, BOMBS[name]())


def test_nesting_has_an_end(tmp_path: Path) -> None:
    deep: Any = torch.ones(1)
    for _ in range(64):
        deep = {"a": deep}
    assert read(tmp_path, saved({"a": deep})).groups
    assert "nested more than 64 deep" in refusal(tmp_path, saved({"a": {"a": deep}}))


def test_a_compressed_member_is_named_as_such(tmp_path: Path) -> None:
    assert "its members are compressed or encrypted" in refusal(tmp_path, _compressed())
