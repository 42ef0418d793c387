"""Checkpoints made for tests: by torch, or instruction by instruction."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blto.errors import InputRefused
from blto.files.foreign.checkpoints import Checkpoint, read_checkpoint

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]


KINDS += [torch.uint8, torch.bool]


def training() -> dict[str, Any]:
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
