"""Benchmarks: the work of one's own children is not a stranger's, and a stranger's is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import timing

BURN = """
import sys, time
while time.process_time() < 0.6: pass
print("burned", flush=True)
sys.stdin.read()
"""
ORPHANED = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
os._exit(0)
"""


def burned(*command: str) -> float:
    """The own CPU seconds that a command adds which has burned 0.6 of them and is still alive."""
    before = timing.cpu_seconds()[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", *command], text=True, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "burned\n"
        return timing.cpu_seconds()[1] - before


def test_a_living_child_is_not_a_stranger() -> None:
    assert burned(BURN) > 0.5


def test_a_stranger_is_one() -> None:
    busy = timing.cpu_seconds()[0]
    own = burned(ORPHANED, BURN)
    assert timing.cpu_seconds()[0] - busy > 0.5
    assert own < 0.4


def test_a_child_that_has_ended_still_counts() -> None:
    before = timing.cpu_seconds()[1]
    subprocess.run([sys.executable, "-c", BURN], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    assert timing.cpu_seconds()[1] - before > 0.5


def test_the_family_is_every_descendant_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PROCESSES", tmp_path)
    parents = {10: 1, 11: 10, 12: 11, 20: 1, 21: 20, 1: 0}  # 12 is a grandchild of 10; 20 and 21 are strangers
    for position, (number, parent) in enumerate(parents.items()):
        seconds = 10**position
        ticks = [seconds * timing.TICKS_PER_SECOND, 0, 0, 0]
        ticks = ticks[position % 4 :] + ticks[: position % 4]  # user, system, and those of finished children
        fields = ["S", parent, *range(9), *ticks, 20, 0]
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "stat").write_text(f"{number} (a) S 1 (b) {' '.join(map(str, fields))}")
    (tmp_path / "30").mkdir()  # has just gone
    assert timing.family_seconds(10) == 111
    assert timing.family_seconds(20) == 11000
    assert timing.family_seconds(os.getpid() + 10**6) == 0
