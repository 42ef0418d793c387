"""Ctrl-C and SIGTERM in mid-training: the contract's code, one line, and the same record after `--resume`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import blto
from blto.files.yaml import dump_yaml
from blto.records import RunStore
from tests.tiny_experiment import TINY_EXPERIMENT

LONGER = {
    **TINY_EXPERIMENT,
    "attack": {"name": "untrained_generator", "target_class": 1, "poison_rate": 0.05},
    "pretraining": {**TINY_EXPERIMENT["pretraining"], "epochs": 40},
}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from blto.cli import main; sys.exit(main())", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been_stopped(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    config, store = tmp_path / "run.yaml", tmp_path / "store"
    config.write_text(dump_yaml(LONGER))
    arguments = ["run", str(config), "--store", str(store), "--device", "cpu", "--quiet"]
    with start(*arguments) as child:
        deadline = time.monotonic() + 300
        while not list((store / "stages").glob("pretrain-*/log.jsonl")):
            assert child.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(number)
        _, err = child.communicate(timeout=600)
    assert child.returncode == code
    assert err.startswith("blto: error[INTERRUPTED]: stopped at step ")
    assert err.endswith("--quiet --resume\n")
    assert err.count("\n") == 1
    assert list((store / "stages").glob("pretrain-*/checkpoint.safetensors"))
    assert not RunStore(store).list()

    with start(*arguments, "--resume", "--json") as child:
        _, err = child.communicate(timeout=600)
    assert (child.returncode, err) == (0, "")
    (resumed,) = RunStore(store).list()
    (straight,) = blto.run(LONGER, store=tmp_path / "other", device="cpu", quiet=True)
    assert resumed.metrics == straight.metrics
    assert resumed.artefacts == straight.artefacts
