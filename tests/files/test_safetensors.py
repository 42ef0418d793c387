"""Weights on disk: exact, the same bytes every time, and no damaged bit goes unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load, save

from blto.errors import InputRefused
from blto.files.safetensors import parse_safetensors, read_safetensors, write_safetensors

DTYPES = [np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8, np.bool_]


def sample() -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(0)
    tensors: dict[str, npt.NDArray[Any]] = {
        f"layer.{np.dtype(kind).name}": rng.integers(0, 2, (3, 5)).astype(kind) for kind in DTYPES
    }
    tensors["scalar"] = np.array(7, np.int64)
    tensors["empty"] = np.zeros((0, 4), np.float32)
    tensors["transposed"] = rng.normal(size=(4, 3)).astype(np.float32).T
    tensors["big_endian"] = np.arange(3, dtype=">f4")
    tensors["special"] = np.array([np.nan, np.inf, -0.0, 1e-45], np.float32)
    return tensors


def assert_equal(one: dict[str, npt.NDArray[Any]], other: dict[str, npt.NDArray[Any]]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(one[name], other[name], strict=False)
        assert one[name].shape == other[name].shape


def foreign(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def refusal(data: bytes) -> str:
    with pytest.raises(InputRefused) as error:
        parse_safetensors(data, "w.safetensors")
    assert error.value.code == "CKPT-REFUSED"
    assert str(error.value).startswith("w.safetensors: ")
    return str(error.value)


def test_everything_comes_back(tmp_path: Path) -> None:
    metadata = {"spec": '{"a": 1}', "name": "é\n", "zeros": "0" * 64, '"blto.sha256":"': "x"}
    write_safetensors(tmp_path / "w", sample(), metadata)
    tensors, read = read_safetensors(tmp_path / "w")
    assert_equal(tensors, sample())
    assert read == metadata
    assert all(array.flags.writeable for array in tensors.values())


def test_the_order_of_the_input_does_not_matter(tmp_path: Path) -> None:
    tensors = sample()
    write_safetensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_library_reads_ours_and_we_read_the_library(tmp_path: Path) -> None:
    tensors = sample()
    write_safetensors(tmp_path / "w", tensors, {"k": "v"})
    assert_equal(load((tmp_path / "w").read_bytes()), tensors)
    del tensors["transposed"], tensors["big_endian"]
    theirs, metadata = parse_safetensors(save(tensors, {"format": "pt"}), "w")
    assert_equal(theirs, tensors)
    assert metadata == {"format": "pt"}


def test_every_single_bit_is_watched(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w", {"w": np.arange(6, dtype=np.float32), "a": np.array([1])}, {"k": "é"})
    data = (tmp_path / "w").read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        refusal(bytes(changed))


def test_bfloat16_is_widened_exactly() -> None:
    values = np.array([1.0, -2.5, 3e38, 0.0], np.float32)
    body = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    tensors, _ = parse_safetensors(
        foreign({"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}, body), "w"
    )
    assert tensors["w"].dtype == np.float32
    np.testing.assert_array_equal(tensors["w"].ravel(), (values.view(np.uint32) & 0xFFFF0000).view(np.float32))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (10**9).to_bytes(8, "little") + b"{}",
        foreign(b"{"),
        foreign([]),
        foreign(b"[" * 200_000),
        foreign({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        foreign({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)),
        foreign({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        foreign({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
        foreign({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4)),
        foreign({"w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}),
        foreign({"w": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, bytes(4)),
        foreign({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        foreign({"w": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        foreign({"__metadata__": {"k": 1}}),
        foreign({"__metadata__": {"blto.sha256": "0" * 64}}),
        foreign({"__metadata__": {"blto.format": "1"}}),
        b"PK\x03\x04" + bytes(100),
    ],
    ids=range(19),
)
def test_broken_structures_are_refused(data: bytes) -> None:
    assert len(refusal(data)) < 300


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w", {"w": np.zeros(100)}, {})
    with pytest.raises(InputRefused, match="limit") as error:
        read_safetensors(tmp_path / "w", max_bytes=500)
    assert error.value.code == "CKPT-REFUSED"
