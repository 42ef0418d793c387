"""Files damaged at random: refused in one line, or read with the content they had. Never anything between."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blto.errors import InputRefused
from blto.files import read_json, write_json
from blto.files.foreign.cifar_batches import parse_batch, read_cifar
from blto.files.images import decode_image, encode_png
from blto.files.parquet import read_image_parquet, write_image_parquet
from blto.files.safetensors import parse_safetensors, write_safetensors
from tests.files.damage import mutants

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 20, 3), np.uint8)


def outcomes(read: Callable[[bytes], Any], data: bytes, count: int) -> list[Any]:
    """What reading each of `count` damaged copies gave, for those that were not refused; some must have been."""
    results, refusals = [], []
    for mutant in mutants(data, count):
        try:
            results.append(read(mutant))
        except InputRefused as error:
            refusals.append(str(error))
    assert refusals
    assert all(message.isprintable() and len(message) < 300 for message in refusals)
    return results


def check(read: Callable[[bytes], Any], data: bytes, count: int = 300) -> None:
    """At least half of the damaged copies must be refused, and the others give what `data` gives."""
    expected = read(data)
    results = outcomes(read, data, count)
    assert all(result == expected for result in results)
    assert len(results) < count / 2


def test_our_safetensors(tmp_path: Path) -> None:
    tensors = {"w": RNG.normal(size=(8, 9)).astype(np.float32), "n": np.array(3), "half": np.ones(5, np.float16)}
    write_safetensors(tmp_path / "w", tensors, {"spec": '{"width": 64}'})

    def read(data: bytes) -> object:
        arrays, metadata = parse_safetensors(data, "w")
        return sorted((name, array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()), metadata

    check(read, (tmp_path / "w").read_bytes())


def test_our_parquet(tmp_path: Path) -> None:
    write_image_parquet(
        tmp_path / "a", [encode_png(PIXELS + n) for n in range(3)], [0, 1, 1], ("cat", "dog"), {"k": "v"}
    )

    def read(data: bytes) -> object:
        (tmp_path / "b").write_bytes(data)
        return list(read_image_parquet([tmp_path / "b"]))

    check(read, (tmp_path / "a").read_bytes())


def test_png() -> None:
    check(lambda data: decode_image(data, "a").tobytes(), encode_png(PIXELS))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "PPM", "TIFF"])
def test_formats_without_a_checksum_give_an_image_or_a_refusal(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    for result in outcomes(lambda data: decode_image(data, "a"), file.getvalue(), 300):
        assert result.dtype == np.uint8
        assert result.ndim == 3
        assert result.shape[2] == 3
    assert capfd.readouterr() == ("", "")  # the C libraries must not print on their own


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_batches_give_plain_data_or_a_refusal(protocol: int) -> None:
    batch = {"data": PIXELS.reshape(2, 720), "labels": [3, 1], "filenames": ["a.png", "b.png"]}
    for result in outcomes(lambda data: parse_batch(data, "a"), pickle.dumps(batch, protocol), 300):
        assert all(type(key) is str for key in result)


def test_cifar_archives(tmp_path: Path) -> None:
    file = io.BytesIO()
    batch = {"data": RNG.integers(0, 256, (1, 3072), np.uint8), "fine_labels": [0]}
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, value in (("meta", {"fine_label_names": ["cat"]}), ("train", batch)):
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            content = pickle.dumps(value, 2)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    def read(data: bytes) -> object:
        (tmp_path / "a.tar.gz").write_bytes(data)
        images, labels, names = read_cifar(tmp_path / "a.tar.gz", "cifar100", "train")
        return images.tobytes(), labels.tolist(), names

    check(read, gzip.compress(file.getvalue(), mtime=0))


def test_json(tmp_path: Path) -> None:
    """JSON has no checksum of its own; what must not happen is another kind of error."""
    write_json(tmp_path / "a", {"metrics": {"asr": 0.5, "n": [1, 2, 3]}, "name": "x" * 40})

    def read(data: bytes) -> object:
        (tmp_path / "b").write_bytes(data)
        return read_json(tmp_path / "b")

    outcomes(read, (tmp_path / "a").read_bytes(), 150)
