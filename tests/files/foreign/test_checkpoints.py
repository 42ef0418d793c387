"""Checkpoints of others: what torch wrote comes back exactly, and nothing else gets in or runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from blto.errors import InputRefused
from blto.files.foreign import groups, sandbox, zipped
from blto.files.foreign.checkpoints import Checkpoint, read_checkpoint
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
            assert array.tobytes() == expected.contiguous().numpy().tobytes(), name
            assert torch.from_numpy(array).dtype == expected.dtype
            assert found.groups[group][name] == tuple(tensor.shape)
            assert array.flags.writeable


def test_safetensors_are_one_group(tmp_path: Path) -> None:
    found = read(tmp_path, save_safetensors({"a.weight": torch.ones(2, 3), "b": torch.zeros(1).bfloat16()}))
    assert (found.format, found.groups, found.layers) == ("safetensors", {"": {"a.weight": (2, 3), "b": (1,)}}, ())
    assert found.arrays("")["a.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_legacy_file_is_read_behind_walls_in_a_process_without_torch(tmp_path: Path) -> None:
    found = read(tmp_path, saved({"a": torch.ones(1)}, legacy=True))
    assert {"address space", "CPU time", "file size", "no core", "no new privileges", "watched"} <= set(found.layers)
    program = "import sys; import blto.files.foreign.sandbox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


ATTEMPTS = [
    "open('{0}', 'w')",
    "import os; os.system('touch {0}')",
    "import os; os.open('{0}', os.O_CREAT)",
    "import subprocess; subprocess.run(['touch', '{0}'])",
    "import socket; socket.socket()",
    "eval('1')",
    "import json.tool",
    "import os; os.fork()",
]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_whoever_tries_more_than_reading_is_ended(tmp_path: Path, attempt: str) -> None:
    line = attempt.format(tmp_path / "PWNED")
    program = f"from blto.files.foreign.sandbox import put_up_walls\nput_up_walls(0)\n{line}\nprint('done')"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (sandbox.ESCAPED, b"")
    assert not (tmp_path / "PWNED").exists()


UNWATCHED = """
import os, socket, sys
from blto.files.foreign import sandbox
sys.addaudithook = lambda hook: None
walls = sandbox.put_up_walls(0)
tries = {
    "address space": lambda: bytearray(2 << 30),
    "file size": lambda: os.write(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), b"x"),
    "no network": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=5),
}
for wall, attempt in tries.items():
    if wall in walls:
        try:
            attempt()
            print("no wall:", wall)
        except (MemoryError, OSError):
            print("held:", wall)
"""


def test_each_wall_that_is_named_stands_alone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = [sys.executable, "-c", UNWATCHED, str(tmp_path / "f"), str(server.getsockname()[1])]
        done = subprocess.run(given, check=False, capture_output=True, text=True)
    assert "no wall" not in done.stdout
    assert {"held: address space", "held: file size"} <= set(done.stdout.splitlines())


def test_a_wall_that_cannot_be_put_up_is_not_named() -> None:
    program = (
        "import resource\nfrom blto.files.foreign import sandbox\n"
        "def fail(*given): raise OSError\n"
        "resource.setrlimit = fail\nprint(*sandbox.put_up_walls(0), sep=', ')"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.stdout.strip().endswith("watched")
    assert not {"address space", "CPU time", "file size", "no core"} & set(done.stdout.strip().split(", "))


def test_a_child_that_dies_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved({"a": torch.ones(1)}, legacy=True)
    for program, said in (
        ("import ctypes; ctypes.string_at(0)", "signal 11"),
        ("import os; os._exit(4)", "it tried what no reading needs"),
        ("import os; os._exit(9)", "exit code 9"),
        ("print('nonsense')", "gave no tensors back"),
        ("import sys; sys.stdout.buffer.write(bytes(1 << 26))", "gave back more than it was given"),
    ):
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -X faulthandler=0 -c "{program}"\n')
        script.chmod(0o755)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", str(script))
            assert said in refusal(tmp_path, data)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert "no process to read it in could be started" in refusal(tmp_path, data)


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


@pytest.mark.parametrize("legacy", [False, True])
def test_what_would_be_other_weights_in_torch_is_refused(tmp_path: Path, legacy: bool) -> None:
    negated = torch.complex(torch.ones(2), torch.ones(2)).conj().imag
    assert negated.is_neg()
    assert "a negated or conjugated tensor" in refusal(tmp_path, saved({"a": negated}, legacy=legacy))
    twice = {0: torch.ones(1), "0": torch.zeros(1)}
    assert "two entries of one name" in refusal(tmp_path, saved(twice, legacy=legacy))
    nested = {"a.b": {"w": torch.ones(1)}, "a": {"b": {"w": torch.zeros(1)}}}
    assert "two mappings of one name" in refusal(tmp_path, saved(nested, legacy=legacy))


def test_one_storage_has_one_type(tmp_path: Path) -> None:
    one = tensor_program(0, (4,), (1,))
    other = one[3:-2].replace(b"FloatStorage", b"IntStorage").replace(b"X\x01\x00\x00\x00w", b"X\x01\x00\x00\x00v")
    assert "one storage in two forms" in refusal(tmp_path, in_zip(one[:-2] + b"s" + other + b"s."))


def test_what_trainings_keep_beside_weights_is_passed_over(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters())
    kept = {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "rng": torch.get_rng_state(),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("abc"),
        "when": datetime.timedelta(seconds=1),
        "array": np.arange(3),
        "kinds": [np.float32(1), torch.complex64, 3 + 4j],
        "by": {(1, 2): "tuple", None: "none", 0.5: "half", True: "true"},
        "path": Path("/tmp"),
        "simple": types.SimpleNamespace(a=1),
    }
    for protocol in (2, 3, 4, 5):
        found = read(tmp_path, saved({"state_dict": network.state_dict(), **kept}, pickle_protocol=protocol))
        assert found.groups["state_dict"] == {"weight": (2, 2), "bias": (2,)}, protocol


def test_omegaconf_is_passed_over(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"lr": 0.1, "sizes": [1, {"a": None}]})
    assert "w" in read(tmp_path, saved({"w": torch.ones(1), "config": config})).groups[""]


def test_the_mappings_of_python_2_are_read(tmp_path: Path) -> None:
    tensor = tensor_program(0, (4,), (1,))[3:-2]
    program = b"\x80\x02ccollections\nOrderedDict\n](]" + tensor[:6] + b"a" + tensor[6:] + b"aea\x85R."
    program = program.replace(b"aea\x85R.", b"ae\x85R.")
    assert read(tmp_path, in_zip(program)).groups == {"": {"w": (4,)}}


@pytest.mark.parametrize("name", ["a" * length for length in range(1, 40)][::4])
def test_safetensors_are_told_by_their_header_not_by_its_length(tmp_path: Path, name: str) -> None:
    for pad in range(128, 1200, 128):
        head = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        data = pad.to_bytes(8, "little") + head.ljust(pad) + bytes(4)
        assert read(tmp_path, data).format == "safetensors"


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


def test_nesting_has_an_end(tmp_path: Path) -> None:
    deep: Any = torch.ones(1)
    for _ in range(64):
        deep = {"a": deep}
    assert read(tmp_path, saved({"a": deep})).groups
    assert "nested more than 64 deep" in refusal(tmp_path, saved({"a": {"a": deep}}))


def test_a_compressed_member_is_named_as_such(tmp_path: Path) -> None:
    assert "its members are compressed or encrypted" in refusal(tmp_path, _compressed())


def test_a_legacy_storage_has_the_size_that_it_says(tmp_path: Path) -> None:
    whole = saved({"a": torch.full((4,), 1.5)}, legacy=True)
    at = whole.index(np.full(4, 1.5, "<f4").tobytes()) - 8
    assert whole[at : at + 8] == (4).to_bytes(8, "little")
    wrong = whole[:at] + (3).to_bytes(8, "little") + whole[at + 8 :]
    assert "a storage of another size than it says" in refusal(tmp_path, wrong)


def test_a_flipped_bit_in_a_weight_is_seen(tmp_path: Path) -> None:
    data = bytearray(saved({"a": torch.full((64,), 1.5)}))
    place = data.find(np.full(8, 1.5, "<f4").tobytes()) + 40
    data[place] ^= 1
    assert "damaged (the checksum of data/0 does not match)" in refusal(tmp_path, bytes(data))


def test_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved({str(number): torch.ones(number + 1) for number in range(9)})
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(InputRefused, match="larger than the limit of 100 bytes"):
        read_checkpoint(tmp_path / "c.pt", max_bytes=100)
    with monkeypatch.context() as patched:
        patched.setattr(groups, "MAX_TENSORS", 8)
        assert "more tensors than weights are" in refusal(tmp_path, data)
    monkeypatch.setattr(zipped, "MAX_INDEX_BYTES", 10)
    assert "its index is larger than 10 bytes" in refusal(tmp_path, data)


def small(kind: str) -> bytes:
    value = {"state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}, "epoch": 1}
    if kind == "safetensors":
        return bytes(save_safetensors({"a": torch.arange(6.0)}, {"x": "y"}))
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
            found = contents(read(tmp_path, mutant))
        except InputRefused:
            refused += 1
            continue
        if kind != "zip":  # without a checksum only the structure can be checked
            continue
        for name, array in ((name, array) for group in found for name, array in group.items()):
            np.testing.assert_array_equal(array, held[name])  # its name, in the file's index, has a checksum too
    assert refused > count / 2
