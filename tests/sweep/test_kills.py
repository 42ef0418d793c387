"""SIGKILL at any moment of a sweep: no result lost, none half-written, no cell run again once it has one.

One process imports everything once and forks a child per attempt; a random time later the child is killed.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blto.errors import ResourceExhausted
from blto.files import read_json
from blto.sweep.plan import Sweep
from blto.sweep.results import CellResult, Results
from blto.sweep.running import Conditions, run_sweep
from tests.files.test_faults import Faults
from tests.sweep import toy

CELLS = 12


def attempt(sweep: Sweep, store: Path, seconds: float) -> bool:
    """Run the sweep in a child for at most `seconds`; whether it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if run_sweep(sweep, Conditions(store, quiet=True, work=toy.work)).count("done") == CELLS else 2
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def table(sweep: Sweep, store: Path) -> list[CellResult]:
    """The results without what tells one attempt from another."""
    found = [Results(store, sweep.name).load(cell.id) for cell in sweep.cells]
    return [one.model_copy(update={"seconds": 0.0, "reused": False}) for one in found if one]


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.full)])
def test_random_kills_lose_nothing_and_repeat_nothing(
    kills: int, make_sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep, rng = make_sweep(*range(CELLS)), random.Random(f"kills {kills}")
    began = time.monotonic()
    run_sweep(sweep, Conditions(tmp_path / "straight", quiet=True, work=toy.work))
    whole, expected, happened = time.monotonic() - began, table(sweep, tmp_path / "straight"), 0
    assert len(expected) == CELLS
    for number in range(kills):
        store = tmp_path / str(number)
        folder = store / "sweeps" / sweep.name
        finished = False
        while not finished:
            results = {file: file.read_bytes() for file in folder.glob("[!.]*")} if folder.exists() else {}
            records = {file: file.read_bytes() for file in store.glob("*/record.json")}
            begun = toy.starts(store)
            finished = attempt(sweep, store, rng.uniform(0, 0.4 * whole))
            happened += not finished
            for file, content in (results | records).items():
                assert file.read_bytes() == content, "what was finished is not touched again"
            found = [read_json(file) for file in folder.glob("[!.]*")] if folder.exists() else []
            assert all(result["status"] == "done" for result in found), "none is half-written"
            with_result = {read_json(file)["run_id"] for file in results}
            assert all(toy.starts(store)[run] == begun[run] for run in with_result), "none is run again"
        assert table(sweep, store) == expected
        assert not list(folder.glob("*.blto-tmp")) + list(folder.glob(".*.blto-tmp"))
        if happened >= kills:
            break
    assert happened >= kills


def test_the_disk_may_be_full_at_every_operation(
    make_sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "STEPS", 1)
    sweep, faults = make_sweep(0), Faults(monkeypatch)
    for number in range(1, 200):
        how = Conditions(tmp_path / str(number), quiet=True, work=toy.work)
        faults.arm(number, errno.ENOSPC)
        try:
            error = run_sweep(sweep, how).error
        except ResourceExhausted as raised:
            error = raised
        complete = faults.count < number
        faults.arm(0, 0)
        if complete:
            assert error is None
            break
        assert error is not None
        assert (error.code, error.exit_code) == ("DISK-FULL", 4)
        again = run_sweep(sweep, how)  # there is room again
        assert (again.count("done"), again.error) == (1, None), "a full disk is not the cell's failure"
    assert 20 < number < 199
