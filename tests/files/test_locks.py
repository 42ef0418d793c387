"""One live process per folder, and none blocked by a dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blto.errors import Busy, ResourceExhausted
from blto.files import locks
from blto.files.locks import DirectoryLock

HOLD = """
import os, sys, time
from pathlib import Path
from blto.files import locks
from blto.files.locks import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    if len(sys.argv) == 2 or os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the lock, and the pid that it (or, with an option, its child) printed then."""
    with subprocess.Popen([sys.executable, "-c", HOLD, folder, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_the_second_is_busy_and_the_kernel_frees_a_killed_owner(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as (process, _):
        began = time.monotonic()
        with pytest.raises(Busy, match=f"in use by pid {process.pid} on host .+ since 20") as refusal:
            DirectoryLock(tmp_path / "run").__enter__()
        assert time.monotonic() - began < 2
        assert str(tmp_path / "run") in str(refusal.value)
        assert refusal.value.exit_code == 5
        process.send_signal(signal.SIGKILL)
        process.wait()
        with DirectoryLock(tmp_path / "run"):
            pass


def test_a_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as (process, child):
        process.kill()
        process.wait()
        try:
            with DirectoryLock(tmp_path):
                os.kill(child, 0)  # still alive
        finally:
            os.kill(child, signal.SIGKILL)


def test_it_is_free_again_afterwards_and_names_nobody(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    for _ in range(2):
        with lock, pytest.raises(Busy, match=f"pid {os.getpid()} "):
            DirectoryLock(tmp_path).__enter__()
    assert (tmp_path / ".lock").read_bytes() == b""


def test_an_owner_that_has_not_yet_written_its_name_is_still_busy(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path):
        (tmp_path / ".lock").write_bytes(b"{")
        with pytest.raises(Busy, match="another process"):
            DirectoryLock(tmp_path).__enter__()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceExhausted, match="cannot be written") as refusal:
        DirectoryLock(tmp_path / "file" / "run").__enter__()
    assert refusal.value.code == "NOT-WRITABLE"


def test_a_group_waits_for_its_own_and_refuses_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "GRACE_SECONDS", 0.2)
    inside = threading.Event()
    order: list[str] = []

    def work() -> None:
        with DirectoryLock(tmp_path, group="a"):
            inside.set()
            time.sleep(0.5)
            order.append("first")

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(Busy, match=f"pid {os.getpid()} "):
        DirectoryLock(tmp_path).__enter__()
    with pytest.raises(Busy):
        DirectoryLock(tmp_path, group="b").__enter__()
    with DirectoryLock(tmp_path, group="a", say=order.append):
        order.append("second")
    thread.join()
    said, *rest = order
    assert said.startswith(f"waits for {tmp_path.name}, in use by pid {os.getpid()} on host ")
    assert rest == ["first", "second"]
