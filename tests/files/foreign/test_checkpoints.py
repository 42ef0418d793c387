"""Checkpoints of others: what torch wrote comes back exactly, and nothing else gets in or runs."""

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

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from blto.errors import InputRefused
from blto.files.foreign import sandbox, weights, zipped
from blto.files.foreign.checkpoints import Checkpoint, read_checkpoint
from blto.files.safetensors import encode_safetensors
from tests.files.damage import mutants

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
KINDS += [torch.uint8, torch.bool]


def content() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    state: dict[str, Any] = dict(net.state_dict())
    state |= {f"of.{str(kind)[6:]}": (10 * torch.rand(3, 5, generator=generator)).to(kind) for kind in KINDS}
    state["turned"], state["part"] = torch.rand(4, 3, generator=generator).t(), torch.arange(20.0)[3:17:2]
    state["number"], state["empty"] = torch.tensor(7), torch.zeros(0, 4)
    state["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    plain = {"epoch": 3, "rate": 0.5, "none": None, "names": ["a", ("b", True)], "long": 2**70}
    rest = {"device": torch.device("cpu"), "kind": torch.float32, "size": torch.Size([1]), "scalar": np.float64(0.5)}
    return {"state_dict": state, "same": net[0].weight, "optimizer": optimizer.state_dict(), **plain, **rest}


def saved(value: Any, *, legacy: bool = False, **how: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy, **how)
    return stream.getvalue()


def read(folder: Path, data: bytes) -> Checkpoint:
    (folder / "c.pt").write_bytes(data)
    return read_checkpoint(folder / "c.pt")


def contents(found: Checkpoint) -> list[dict[str, Any]]:
    return [found.arrays(group) for group in found.groups]


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(InputRefused) as error:
        contents(read(folder, data))
    assert error.value.code == "CKPT-REFUSED"
    text = str(error.value)
    assert text.startswith(str(folder / "c.pt"))
    assert "\n" not in text
    assert len(text) <= 300 + len(str(folder))
    return text


def at(value: Any, place: str) -> Any:
    for key in place.split(".") if place else ():
        value = value[int(key)] if key.isdecimal() else value[key]
    return value


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_wrote_comes_back(tmp_path: Path, legacy: bool) -> None:
    value = content()
    found = read(tmp_path, saved(value, legacy=legacy))
    assert found.format == ("torch legacy" if legacy else "torch zip")
    assert set(found.groups) == {"", "state_dict", "optimizer.state.0", "optimizer.state.1", "optimizer.state.2"}
    for group in found.groups:
        for name, array in found.arrays(group).items():
            tensor = at(value, group)[name].detach()
            expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            assert torch.equal(torch.from_numpy(array).nan_to_num(5), expected.nan_to_num(5)), name
            assert torch.from_numpy(array).dtype == expected.dtype
            assert found.groups[group][name] == tuple(tensor.shape)
            assert array.flags.writeable


def test_safetensors_are_one_group(tmp_path: Path) -> None:
    found = read(tmp_path, save_safetensors({"a.weight": torch.ones(2, 3), "b": torch.zeros(1).bfloat16()}))
    assert (found.format, found.groups, found.layers) == ("safetensors", {"": {"a.weight": (2, 3), "b": (1,)}}, ())
    assert found.arrays("")["a.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_legacy_file_is_read_behind_walls_in_a_process_without_torch(tmp_path: Path) -> None:
    found = read(tmp_path, saved({"a": torch.ones(1)}, legacy=True))
    assert {"address space", "CPU time", "no files", "no core", "no new privileges", "watched"} <= set(found.layers)
    program = "import sys; import blto.files.foreign.sandbox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    "attempt",
    [
        "open('{0}', 'w')",
        "import os; os.system('touch {0}')",
        "import os; os.open('{0}', os.O_CREAT)",
        "import subprocess; subprocess.run(['touch', '{0}'])",
        "import socket; socket.socket()",
        "eval('1')",
        "import json.tool",
        "import os; os.fork()",
    ],
)
def test_behind_the_walls_nothing_but_reading_works(tmp_path: Path, attempt: str) -> None:
    line = attempt.format(tmp_path / "PWNED")
    program = f"from blto.files.foreign.sandbox import put_up_walls\nput_up_walls(0)\n{line}\nprint('done')"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (sandbox.ESCAPED, b"")
    assert not (tmp_path / "PWNED").exists()


def test_a_child_that_dies_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved({"a": torch.ones(1)}, legacy=True)
    for program, said in (
        ("import ctypes; ctypes.string_at(0)", "signal 11"),
        ("import os; os._exit(4)", "it tried what no reading needs"),
        ("import os; os._exit(9)", "exit code 9"),
        ("print('nonsense')", "gave no tensors back"),
    ):
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -X faulthandler=0 -c "{program}"\n')
        script.chmod(0o755)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", str(script))
            assert said in refusal(tmp_path, data)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def named(module: str, name: str, argument: str) -> bytes:
    """A program that calls a name with one text."""
    text = argument.encode()
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


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


def in_zip(program: bytes, **members: bytes) -> bytes:
    """A zip checkpoint with this index."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in {"data.pkl": program, "data/0": bytes(64), "version": b"3\n", **members}.items():
            archive.writestr(f"x/{name}", data)
    return stream.getvalue()


def in_legacy(program: bytes) -> bytes:
    """A legacy checkpoint with this object."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = (0x1950A86A20F9469CFC6C, 1001, system)
    return b"".join(pickle.dumps(part, 2) for part in head) + program + pickle.dumps([], 2)


NAMES = sorted(payloads("x"))


@pytest.mark.parametrize("name", NAMES)
def test_no_payload_is_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "PWNED"
    program = payloads(str(marker))[name]
    for data in (in_zip(program), program, in_zip(b"\x80\x02}", other=program)):
        refusal(tmp_path, data)
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES[::4])
def test_no_payload_is_run_in_a_legacy_file(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "PWNED"
    refusal(tmp_path, in_legacy(payloads(str(marker))[name]))
    assert not marker.exists()


def test_a_payload_is_named(tmp_path: Path) -> None:
    for data in (in_zip(pickle.dumps(Call(os.system, "x"), 2)), in_legacy(pickle.dumps(Call(os.system, "x"), 2))):
        assert "it refers to posix.system, which weights never need; nothing was run" in refusal(tmp_path, data)


def tensor_program(
    offset: int, shape: tuple[int, ...], stride: tuple[int, ...], numel: int = 16, key: str = "0"
) -> bytes:
    """An index whose mapping has one tensor, of the storage `key` of `numel` float32."""

    def number(value: int) -> bytes:
        return b"\x8a\x07" + value.to_bytes(7, "little", signed=True)

    def sizes(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    rest = number(offset) + sizes(shape) + sizes(stride) + b"\x89}"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tRs."


def test_a_tensor_stays_inside_its_bytes(tmp_path: Path) -> None:
    assert read(tmp_path, in_zip(tensor_program(0, (4, 4), (4, 1)))).arrays("")["w"].shape == (4, 4)
    for wrong in (
        (0, (4, 5), (4, 1)),  # one row too long
        (1, (16,), (1,)),
        (0, (2, 8), (9, 1)),
        (0, (10**6, 10**6), (0, 0)),  # a few bytes as 10^12 numbers
        (0, (17,), (0,)),
        (-1, (4,), (1,)),
        (0, (-4,), (1,)),
        (0, (4,), (-1,)),
        (0, (4, 4), (1,)),
        (2**50, (1,), (1,)),
    ):
        assert "a tensor" in refusal(tmp_path, in_zip(tensor_program(*wrong)))
    assert "missing or cut short" in refusal(tmp_path, in_zip(tensor_program(0, (17,), (1,), numel=17)))
    assert "missing or cut short" in refusal(tmp_path, in_zip(tensor_program(0, (1,), (1,), key="1")))


def nest(depth: int) -> bytes:
    return b"\x80\x02" + b"(" * depth + b"t" * depth + b"."


LAUGHS = b"\x80\x02]" + b"".join(b"q" + bytes([k]) + b"](" + (b"h" + bytes([k])) * 10 + b"e" for k in range(60)) + b"."
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
    "half a zip": lambda: saved(content())[:500],
    "half a legacy file": lambda: saved(content(), legacy=True)[:-4],
    "more than a legacy file": lambda: saved(content(), legacy=True) + b"x",
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


def test_a_flipped_bit_in_a_weight_is_seen(tmp_path: Path) -> None:
    data = bytearray(saved({"a": torch.full((64,), 1.5)}))
    place = data.find(np.full(8, 1.5, "<f4").tobytes()) + 40
    data[place] ^= 1
    assert "damaged (Bad CRC-32" in refusal(tmp_path, bytes(data))


def test_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved({str(number): torch.ones(number + 1) for number in range(9)})
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(InputRefused, match="larger than the limit of 100 bytes"):
        read_checkpoint(tmp_path / "c.pt", max_bytes=100)
    monkeypatch.setattr(weights, "MAX_TENSORS", 8)
    assert "more than 8 tensors" in refusal(tmp_path, data)
    monkeypatch.setattr(zipped, "MAX_INDEX_BYTES", 10)
    assert "its index is larger than 10 bytes" in refusal(tmp_path, data)


def small(kind: str) -> bytes:
    value = {"state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}, "epoch": 1}
    if kind == "safetensors":
        return encode_safetensors({"a": np.arange(6, dtype=np.float32)}, {"x": "y"})
    return saved(value, legacy=kind == "legacy")


@pytest.mark.parametrize(
    ("kind", "count"),
    [("zip", 1000), ("safetensors", 1000), ("legacy", 14)]
    + [pytest.param(kind, 10_000, marks=pytest.mark.full) for kind in ("zip", "safetensors")]
    + [pytest.param("legacy", 350, marks=pytest.mark.full)],
)
def test_a_damaged_file_is_refused_or_gives_what_it_held(tmp_path: Path, kind: str, count: int) -> None:
    whole = small(kind)
    held = {name: array for array_of in contents(read(tmp_path, whole)) for name, array in array_of.items()}
    refused = 0
    for mutant in mutants(whole, count):
        try:
            groups = contents(read(tmp_path, mutant))
        except InputRefused:
            refused += 1
            continue
        if kind == "legacy":  # a format without a checksum: only its structure can be checked
            continue
        for name, array in ((name, array) for group in groups for name, array in group.items()):
            np.testing.assert_array_equal(array, held[name])  # its name, in the file's index, has a checksum too
    assert refused > count / 2
