"""Writing and reading back: complete or not at all, and one line where something is wrong."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from blto.errors import ConfigError, InputRefused, ResourceExhausted
from blto.files import (
    append_jsonl,
    atomic_file,
    atomic_write,
    canonical_json,
    open_regular,
    read_bytes,
    read_json,
    read_jsonl,
    remove_leftovers,
    sha256_bytes,
    sha256_file,
    staged_directory,
    write_json,
    write_staged,
    write_text,
)
from blto.files.atomic import disk_errors

DIE_IN_A_WRITE = """
import os, sys
from pathlib import Path
from blto.files.atomic import atomic_file, staged_directory
with staged_directory(Path(sys.argv[1], "set")) as folder, atomic_file(Path(sys.argv[1], "a.bin")) as file:
    (folder / "x").touch()
    file.write(b"new" * 1000000)
    os._exit(9)
"""
SMALL_LIMIT = """
import resource, sys
from pathlib import Path
from blto.errors import ResourceExhausted
from blto.files.atomic import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    atomic_write(Path(sys.argv[1]), bytes(20000))
except ResourceExhausted as error:
    print(error.code, error)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.bin"
    for data in (b"", b"old", b"x" * 3_000_000):
        atomic_write(path, data)
        assert path.read_bytes() == data
    assert names(path.parent) == ["a.bin"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "é")
    finally:
        os.umask(previous)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a.txt").read_text() == "é"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    atomic_write(tmp_path / name, b"data")
    assert names(tmp_path) == [name]


def test_an_error_in_the_block_keeps_the_old_file_and_passes_through(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    atomic_write(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_killed_writer_leaves_the_old_file_and_a_leftover_that_is_ours(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.bin", b"old")
    for name in ("notes.tmp", ".a.bin.0123.blto-tmp", "x.0123456789abcdef.blto-tmp"):
        (tmp_path / name).touch()
    before = names(tmp_path)
    assert subprocess.run([sys.executable, "-c", DIE_IN_A_WRITE, tmp_path], check=False).returncode == 9
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    leftovers = sorted(set(names(tmp_path)) - set(before))
    assert [name[:7] for name in leftovers] == [".a.bin.", ".set." + leftovers[1][5:7]]
    assert remove_leftovers(tmp_path) == leftovers
    assert names(tmp_path) == before


def test_a_leftover_that_is_a_link_is_unlinked_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".a.0123456789abcdef.blto-tmp").symlink_to("precious")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["precious"]
    assert names(tmp_path / "precious") == ["file"]


def test_leftovers_of_a_missing_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="absent: cannot be written"):
        remove_leftovers(tmp_path / "absent")


def test_a_real_size_limit_is_disk_full(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", b"old")
    done = subprocess.run(
        [sys.executable, "-c", SMALL_LIMIT, tmp_path / "a"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"DISK-FULL {tmp_path / 'a'}: no room to write (File too large; ")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "DISK-FULL"),
        (errno.EDQUOT, "DISK-FULL"),
        (errno.EFBIG, "DISK-FULL"),
        (errno.EROFS, "NOT-WRITABLE"),
        (errno.EACCES, "NOT-WRITABLE"),
        (errno.EIO, "NOT-WRITABLE"),
    ],
)
def test_refusals_of_the_system_have_a_code_and_the_free_space(tmp_path: Path, number: int, code: str) -> None:
    with (
        pytest.raises(ResourceExhausted, match=r"/missing/a: .*[1-9]\d* B free") as refusal,
        disk_errors(tmp_path / "missing" / "a"),
    ):
        raise OSError(number, os.strerror(number))
    assert refusal.value.code == code
    assert refusal.value.exit_code == 4


def test_a_staged_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()  # an empty folder may be there
    with staged_directory(target) as folder:
        write_staged(folder / "a" / "1.png", b"one")
        atomic_write(folder / "b.json", b"{}")
        assert list(target.iterdir()) == []
    assert (target / "a" / "1.png").read_bytes() == b"one"
    assert names(target) == ["a", "b.json"]
    assert names(tmp_path) == ["out"]


def test_a_staged_folder_vanishes_with_an_error(tmp_path: Path) -> None:
    def failing() -> None:
        with staged_directory(tmp_path / "out") as folder:
            write_staged(folder / "a", b"")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["full", "file", "link"])
def test_a_staged_folder_replaces_nothing(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "full":
        target.mkdir()
        (target / "mine").touch()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists and is not empty; choose another"):
        staged_directory(target).__enter__()
    assert names(tmp_path) == ["out"]


def test_a_folder_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def race() -> None:
        with staged_directory(tmp_path / "out") as folder:
            write_staged(folder / "a", b"ours")
            atomic_write(tmp_path / "out" / "a", b"theirs")

    with pytest.raises(ConfigError, match="not empty"):
        race()
    assert (tmp_path / "out" / "a").read_bytes() == b"theirs"
    assert names(tmp_path) == ["out"]


def test_json_is_stable_and_ascii(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "é\udcff\x1b"}
    write_json(tmp_path / "a.json", value)
    data = (tmp_path / "a.json").read_bytes()
    assert data.isascii()
    assert data.endswith(b"}\n")
    assert read_json(tmp_path / "a.json") == value
    assert canonical_json(value) == b'{"a":"\\u00e9\\udcff\\u001b","b":[1,2.5,null]}'


def test_nan_is_found_before_anything_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"asr": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"asr": math.nan})
    assert read_json(tmp_path / "a.json") == {"asr": 0.5}


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff", b"[" * 100_000, b"1" * 5000, b'{"a":1}x', b"\x00"],
    ids=range(9),
)
def test_damaged_json_is_refused_and_names_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputRefused, match=r"a\.json: not valid JSON") as refusal:
        read_json(tmp_path / "a.json")
    assert len(str(refusal.value)) < 300


def test_a_log_grows_and_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log.jsonl"
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2, "text": "a\nb"})
    whole = path.read_bytes()
    for torn in (b'{"step"', b"\xff\xfe", b'{"step": 3}', b"x" * 200_000):
        path.write_bytes(whole + torn)
        assert [record["step"] for record in read_jsonl(path)] == [1, 2]
        append_jsonl(path, {"step": 3})
        assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3]


def test_a_log_that_is_only_a_torn_line_starts_again(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b'{"st')
    append_jsonl(tmp_path / "log", {"step": 1})
    assert read_jsonl(tmp_path / "log") == [{"step": 1}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"", b'{"a": NaN}'])
def test_a_damaged_line_within_a_log_is_refused(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "log").write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    with pytest.raises(InputRefused, match="log: line 2"):
        read_jsonl(tmp_path / "log")


def test_sums_are_sha256(tmp_path: Path) -> None:
    data = b"blto" * 100_000
    atomic_write(tmp_path / "a", data)
    assert sha256_file(tmp_path / "a") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "link"):
        with pytest.raises(InputRefused, match="not a regular file"):
            open_regular(path)
    for path in (tmp_path / "missing", tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(InputRefused, match="cannot be opened"):
            sha256_file(path)


def test_links_are_followed_unless_told_not_to(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", b"data")
    (tmp_path / "link").symlink_to("a")
    assert read_bytes(tmp_path / "link") == b"data"
    with pytest.raises(InputRefused, match="cannot be opened"):
        read_bytes(tmp_path / "link", follow_links=False)


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", b"12345")
    assert read_bytes(tmp_path / "a", max_bytes=5) == b"12345"
    with pytest.raises(InputRefused, match="larger than the limit of 4 bytes") as refusal:
        read_bytes(tmp_path / "a", max_bytes=4, code="CKPT-REFUSED")
    assert refusal.value.code == "CKPT-REFUSED"


def test_a_small_file_takes_little_memory_to_read(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", b"12345")
    tracemalloc.start()
    assert read_bytes(tmp_path / "a") == b"12345"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_grows_while_it_is_read_is_read_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_write(tmp_path / "a", b"12345")
    status = list(os.stat(tmp_path / "a"))
    status[6] = 3  # its size a moment ago
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result(status))
    assert read_bytes(tmp_path / "a", max_bytes=5) == b"12345"
    with pytest.raises(InputRefused, match="larger than the limit of 4 bytes"):
        read_bytes(tmp_path / "a", max_bytes=4)
