"""Every operation of every writer is made to fail in turn: the old content or the new one, and no temporary file."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from blto.errors import ResourceExhausted
from blto.files import append_jsonl, atomic_write, staged_directory, write_json, write_staged, write_text
from blto.files.download import download
from blto.files.images import encode_png
from blto.files.parquet import write_image_parquet
from blto.files.safetensors import write_safetensors

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def staged(folder: Path, version: int) -> None:
    with staged_directory(folder / f"set{version}") as inside:
        write_staged(inside / "cat" / "1.png", encode_png(PIXELS + version))
        write_json(inside / "manifest.json", {"version": version})


def parquet(folder: Path, version: int) -> None:
    write_image_parquet(folder / "a.parquet", [encode_png(PIXELS + version)] * 3, [0, 1, version], ("a", "b"), {})


def fetched(folder: Path, version: int) -> None:
    sums = ("cfcd208495d565ef66e7dff9f98764da", "c4ca4238a0b923820dcc509a6f75849b")  # of "0" and "1"
    download(f"https://example.org/{version}", folder / "a.bin", md5=sums[version])


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "atomic_write": lambda folder, version: atomic_write(folder / "a.bin", bytes([version]) * 3_000_000),
    "write_text": lambda folder, version: write_text(folder / "new" / "a.txt", f"version {version}"),
    "write_json": lambda folder, version: write_json(folder / "a.json", {"version": version}),
    "append_jsonl": lambda folder, version: append_jsonl(folder / "log.jsonl", {"version": version}),
    "write_safetensors": lambda folder, version: write_safetensors(folder / "w", {"w": PIXELS + version}, {"k": "v"}),
    "write_image_parquet": parquet,
    "staged_directory": staged,
    "download": fetched,
}


class Response(io.BytesIO):
    """The shape of urllib's response."""

    headers: ClassVar[dict[str, str]] = {}


class Faults:
    """Counts the operations that change the disk, and lets the one with a given number fail.

    A write that fails takes half of its data first, and every write after it fails too, as on a full disk.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fail_at = 0
        self.error = 0
        self.log: list[tuple[str, str, str]] = []
        for name in ("open", "write", "fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def arm(self, fail_at: int, error: int) -> None:
        self.count, self.fail_at, self.error = 0, fail_at, error
        self.log.clear()

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.fail_at and name == "write":
                return real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if self.count == self.fail_at or (0 < self.fail_at < self.count and name == "write"):
                raise OSError(self.error, os.strerror(self.error))
            place = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else str(arguments[0])
            self.log.append((name, place, str(arguments[1]) if name == "replace" else ""))
            return real(*arguments, **options)

        return operation


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Response(url[-1].encode()))
    return Faults(monkeypatch)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_operation_may_fail(tmp_path: Path, faults: Faults, writer: str, error: int) -> None:
    write = WRITERS[writer]
    write(tmp_path / "expected", 0)
    old = snapshot(tmp_path / "expected")
    write(tmp_path / "expected", 1)
    new = snapshot(tmp_path / "expected")
    assert old != new
    for fail_at in range(1, 100):
        folder = tmp_path / str(fail_at)
        faults.arm(0, 0)
        write(folder, 0)
        faults.arm(fail_at, error)
        try:
            write(folder, 1)
        except ResourceExhausted as failure:
            code = failure.code
        else:
            code = "done"
        if code == "done":
            assert faults.count < fail_at
            break
        assert code == ("DISK-FULL" if error == errno.ENOSPC else "NOT-WRITABLE")
        assert snapshot(folder) in (old, new)
        assert not list(folder.rglob("*.blto-tmp"))
        if snapshot(folder) == old:
            faults.arm(0, 0)
            write(folder, 1)  # the same command works once there is room
        assert snapshot(folder) == new
    assert fail_at > (2 if writer == "append_jsonl" else 5)
    assert snapshot(folder) == new


@pytest.mark.parametrize("writer", WRITERS)
def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults, writer: str
) -> None:
    WRITERS[writer](tmp_path / "expected", 1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: (len(data) + 1) // 2]))
    WRITERS[writer](tmp_path / "short", 1)
    assert snapshot(tmp_path / "short") == snapshot(tmp_path / "expected")


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "append_jsonl"])
def test_data_reaches_the_disk_before_its_name_does(tmp_path: Path, faults: Faults, writer: str) -> None:
    WRITERS[writer](tmp_path, 0)
    renames = [number for number, (name, _, _) in enumerate(faults.log) if name == "replace"]
    assert renames
    for rename in renames:
        _, source, target = faults.log[rename]
        written = [entry for entry in faults.log[:rename] if entry[0] == "write" and entry[1].startswith(source)]
        assert written
        for entry in written:
            last = max(number for number in range(rename) if faults.log[number] == entry)
            assert ("fsync", entry[1], "") in faults.log[last:rename]
        assert ("fsync", str(Path(target).parent), "") in faults.log[rename:]
