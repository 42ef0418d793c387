"""Timing on a machine that is not quiet: candidates take turns, and a turn that a stranger disturbed does not count."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

FOREIGN_LIMIT = 0.25
"""Cores that strangers may use during a turn that counts."""
PROCESSES = Path("/proc")
"""Where Linux tells what every process does; see proc_pid_stat(5)."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    """One candidate's turn: seconds, images processed, and the cores that other processes used meanwhile."""

    seconds: float
    images: int
    foreign: float


def cpu_seconds() -> tuple[float, float]:
    """Busy seconds of the whole machine, and of this process with its descendants."""
    ticks = [int(value) for value in (PROCESSES / "stat").read_text().splitlines()[0].split()[1:]]
    busy = (sum(ticks[:8]) - ticks[3] - ticks[4]) / TICKS_PER_SECOND
    return busy, family_seconds(os.getpid())


def family_seconds(ancestor: int) -> float:
    """CPU seconds of a process and all its descendants: those alive, and those that ended and were waited for."""
    found = dict(filter(None, map(parent_and_seconds, PROCESSES.glob("[0-9]*/stat"))))
    family, added = set[int](), {ancestor}
    while added:
        family |= added
        added = {number for number, (parent, _) in found.items() if parent in family} - family
    return sum(found[number][1] for number in family & found.keys())


def parent_and_seconds(stat: Path) -> tuple[int, tuple[int, float]] | None:
    """Number, parent and CPU seconds of a process, with those of its finished children; None where it has just gone."""
    try:
        fields = stat.read_text(errors="replace").rpartition(")")[2].split()  # the name before may hold anything
    except OSError:
        return None
    return int(stat.parent.name), (int(fields[1]), sum(map(int, fields[11:15])) / TICKS_PER_SECOND)


def take_turn(work: Callable[[], int]) -> Turn:
    """Run `work`, which returns the number of images it processed."""
    busy, own = cpu_seconds()
    start = time.perf_counter()
    images = work()
    seconds = time.perf_counter() - start
    busy_after, own_after = cpu_seconds()
    return Turn(seconds, images, max(0.0, (busy_after - busy - (own_after - own)) / seconds))


def matmul_rates() -> dict[str, float]:
    """GFLOP/s of a 4096^3 matrix product, best of three: what this machine can do at the moment."""
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        first, second = (torch.randn(4096, 4096).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            first @ second
            seconds.append(time.perf_counter() - start)
        rates[name] = 2 * 4096**3 / min(seconds[1:]) / 1e9
    return rates


def interleave(candidates: Mapping[str, Callable[[], int]], *, rounds: int, pause: float = 0) -> dict[str, list[Turn]]:
    """`rounds` rounds in which every candidate has one turn, after one that does not count.

    `pause` seconds pass after each turn: what workers fetch ahead is then done before the next one's turn.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, work in candidates.items():
            turns[name].append(take_turn(work))
            time.sleep(pause)
    return {name: of_name[1:] for name, of_name in turns.items()}


def compare(turns: Mapping[str, list[Turn]], ours: str, other: str, limit: float = FOREIGN_LIMIT) -> dict[str, object]:
    """The ratio of rates ours / other, round by round, over the rounds in which neither was disturbed."""
    pairs = [
        (mine.images / mine.seconds) / (theirs.images / theirs.seconds)
        for mine, theirs in zip(turns[ours], turns[other], strict=True)
        if max(mine.foreign, theirs.foreign) <= limit
    ]
    verdict: dict[str, object] = {"ours": ours, "other": other, "clean_rounds": len(pairs), "rounds": len(turns[ours])}
    if len(pairs) >= 3:
        verdict |= {"ratio": statistics.median(pairs), "low": min(pairs), "high": max(pairs)}
    return verdict


def rate(turns: list[Turn], limit: float = FOREIGN_LIMIT) -> float | None:
    """Median images a second over the undisturbed turns; None where there are none."""
    clean = [turn.images / turn.seconds for turn in turns if turn.foreign <= limit]
    return statistics.median(clean) if clean else None


def rows(turns: Mapping[str, list[Turn]]) -> dict[str, list[dict[str, float]]]:
    """Every turn as plain data."""
    return {name: [asdict(turn) for turn in of_name] for name, of_name in turns.items()}
