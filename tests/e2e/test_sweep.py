"""The sweep of the documentation, from the command line, in workers: stopped, killed, and gone on with."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import blto
from blto import experiment
from blto.configuration import environment
from blto.records import RunRecord, RunStore
from blto.sweep.plan import read_sweep

SMOKE = Path(__file__).parents[2] / "configs/sweeps/smoke.yaml"


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from blto.cli import main; sys.exit(main())", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.full
def test_the_documented_sweep_survives_stops_and_kills_and_shares_its_stages(tmp_path: Path) -> None:
    store, rng = tmp_path / "store", random.Random(0)
    arguments = ["sweep", str(SMOKE), "--store", str(store), "--device", "cpu", "--executor", "processes"]
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        with start(*arguments) as child:
            assert child.stderr is not None
            assert " begins (" in child.stderr.readline()
            time.sleep(rng.uniform(2, 7))  # two fast cores need eleven seconds for all of it
            child.send_signal(number)
            _, err = child.communicate(timeout=600)
        if "(6 done" in err:  # it was faster than the signal
            break
        assert child.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGINT: 130}[number]
        if number != signal.SIGKILL:
            last = err.splitlines()[-1]
            assert last.startswith("blto: error[INTERRUPTED]: stopped with ")
            assert "Go on with: blto sweep " in last
    with start(*arguments, "--quiet", "--json") as child:
        out, err = child.communicate(timeout=900)
    assert (child.returncode, err) == (0, "")
    cells = json.loads(out)["cells"]
    assert [cell["status"] for cell in cells] == ["done"] * 6
    assert {cell["run_id"] for cell in cells} == {record.run_id for record in RunStore(store).list()}
    trained = [path for path in (store / "stages").glob("pretrain-*") if (path / "stage.json").exists()]
    assert len(trained) == 6, "a clean twin a seed, which is also the victim of the cell without poison"

    straight = {record.run_id: record for record in _straight(tmp_path / "straight")}
    assert {cell["run_id"]: cell["result"]["metrics"] for cell in cells} == {
        run_id: record.model_dump(mode="json")["metrics"] for run_id, record in straight.items()
    }
    exported = blto.sweep(SMOKE, store=store, device="cpu", export=tmp_path / "out").exported
    assert exported is not None
    assert not exported.left_out
    assert len(list((tmp_path / "out" / "clean_twins").iterdir())) == 2


def _straight(store: Path) -> list[RunRecord]:
    """The same cells as single runs, one after the other, with one thread, as a worker has."""
    where, threads = environment(store=store, device="cpu", quiet=True), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [experiment.run(cell.spec, where) for cell in read_sweep(SMOKE).cells]
    finally:
        torch.set_num_threads(threads)
