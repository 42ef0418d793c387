"""A sweep of toys: what is kept of each cell, what fails, what waits, and when it stops."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blto import experiment
from blto.cli import main
from blto.errors import Busy, ConfigError, Diverged, Interrupted
from blto.experiment import Environment, ExperimentSpec
from blto.files import DirectoryLock
from blto.files.yaml import dump_yaml
from blto.records import RunRecord
from blto.sweep.cell import run_cell
from blto.sweep.live import SweepView
from blto.sweep.plan import Sweep
from blto.sweep.queue import HOUR, SweepQueue
from blto.sweep.results import CellResult, Results
from blto.sweep.running import Conditions, run_sweep
from tests.sweep import toy
from tests.tiny_experiment import TINY_EXPERIMENT

MakeSweep = Callable[..., Sweep]


@pytest.fixture
def how(tmp_path: Path) -> Conditions:
    return Conditions(tmp_path / "store", quiet=True, work=toy.work)


def test_every_cell_runs_once_and_the_next_call_finds_all_done(make_sweep: MakeSweep, how: Conditions) -> None:
    sweep = make_sweep(0, 1, 2)
    first = run_sweep(sweep, how)
    assert [cell.status for cell in first.cells] == ["done"] * 3
    assert first.error is None
    again = run_sweep(sweep, how)
    assert [cell.result for cell in again.cells] == [cell.result for cell in first.cells]
    assert set(toy.starts(how.store).values()) == {1}
    asr = first.cells[1].result.metric("asr") if first.cells[1].result else None
    assert asr is not None
    assert asr.value == pytest.approx(1 / 3)
    (file, *others) = sorted((how.store / "sweeps" / "toy").iterdir())
    assert (file.suffix, len(others)) == (".json", 2)


def test_a_failed_cell_ends_nothing_and_is_run_again_only_when_asked(make_sweep: MakeSweep, how: Conditions) -> None:
    sweep, how = make_sweep(0, 1, 2, 3, 7), replace(how, work=toy.mishaps)
    result = run_sweep(sweep, how)
    assert [cell.status for cell in result.cells] == ["done", "failed", "failed", "failed", "done"]
    codes = [cell.result.code for cell in result.cells if cell.result and cell.status == "failed"]
    assert codes == ["DIVERGED", "BUG", "OUT-OF-MEMORY"]
    assert result.error is not None
    assert (result.error.code, result.error.exit_code) == ("DIVERGED", 7)
    assert str(result.error).startswith(f"3 of 5 cells failed; the first, {sweep.cells[1].id}: NaN at step 5. ")
    (trace,) = (how.store / "sweeps" / "toy").glob("*.crash.txt")
    assert "KeyError: 'a bug'" in trace.read_text()

    mended = replace(how, work=toy.work)
    assert run_sweep(sweep, mended).count("failed") == 3
    assert set(toy.starts(how.store).values()) == {1}
    assert run_sweep(sweep, replace(mended, retry_failed=True)).count("done") == 5


def test_what_is_in_use_elsewhere_waits_and_the_others_go_on(make_sweep: MakeSweep, how: Conditions) -> None:
    result = run_sweep(make_sweep(4, 0), replace(how, work=toy.mishaps))
    assert [cell.status for cell in result.cells] == ["waiting", "done"]
    assert isinstance(result.error, Busy)
    assert run_sweep(make_sweep(4, 0), how).count("done") == 2


def test_a_full_disk_ends_the_sweep_and_is_nobodys_failure(make_sweep: MakeSweep, how: Conditions) -> None:
    result = run_sweep(make_sweep(0, 5, 7), replace(how, work=toy.mishaps))
    assert [cell.status for cell in result.cells] == ["done", "waiting", "waiting"]
    assert result.error is not None
    assert (result.error.code, result.error.exit_code) == ("DISK-FULL", 4)


def test_a_signal_stops_at_a_checkpoint_and_the_next_call_goes_on(make_sweep: MakeSweep, how: Conditions) -> None:
    sweep = make_sweep(0, 6, 7)
    with pytest.raises(Interrupted, match="stopped with 1 of 3 cells done") as stopped:
        run_sweep(sweep, replace(how, work=toy.mishaps))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    kept = Results(how.store, "toy").load(sweep.cells[1].id)
    assert kept is not None
    assert kept.status == "stopped"
    result = run_sweep(sweep, how)
    assert result.count("done") == 3
    assert result.cells[1].result is not None
    assert result.cells[1].result.seconds > kept.seconds, "the time before the stop counts"


def test_when_the_time_is_over_the_running_cell_stops_and_none_follows(make_sweep: MakeSweep, how: Conditions) -> None:
    sweep = make_sweep(0, 1)
    began = time.monotonic()
    short = replace(how, work=toy.endless, max_hours=0.3 / HOUR, expected_hours=0.1 / HOUR)
    result = run_sweep(sweep, short)
    assert 0.25 < time.monotonic() - began < 5
    assert result.error is None
    assert [cell.result.status if cell.result else "" for cell in result.cells] == ["stopped", ""]
    assert run_sweep(sweep, how).count("done") == 2


def done(sweep: Sweep, store: Path, cell: int, seconds: float, *, reused: bool = False) -> None:
    run_id = sweep.cells[cell].spec.run_id
    result = CellResult(cell=sweep.cells[cell].id, run_id=run_id, status="done", seconds=seconds, reused=reused)
    Results(store, sweep.name).save(result)


def test_no_cell_is_begun_that_would_not_end_in_time(make_sweep: MakeSweep, how: Conditions) -> None:
    sweep = make_sweep(0, 1, 2, 3)
    with pytest.raises(ConfigError, match="--max-hours 1: nothing says yet how long a cell takes"):
        run_sweep(sweep, replace(how, max_hours=1.0))
    with pytest.raises(ConfigError, match=rf"--max-hours is 1, but cell {sweep.cells[0].id} is expected to take 2 h"):
        run_sweep(sweep, replace(how, max_hours=1.0, expected_hours=2.0))
    assert not how.store.exists()
    done(sweep, how.store, 0, 3 * HOUR)
    done(sweep, how.store, 1, 5 * HOUR)
    done(sweep, how.store, 2, 0.0, reused=True)  # which says nothing of the time
    with pytest.raises(ConfigError, match="expected to take 4 hours; give at least that"):
        run_sweep(sweep, replace(how, max_hours=3.9, expected_hours=0.1))
    queue = SweepQueue(sweep, Results(how.store, sweep.name), lambda cell: {}, SweepView(quiet=True), max_hours=3.9)
    assert queue.next() is None  # what is too short at the start is too short later
    assert run_sweep(sweep, replace(how, max_hours=4.0)).count("done") == 4  # who follows the advice gets a cell


def test_the_hours_that_are_asked_for_are_never_less_than_needed(make_sweep: MakeSweep, how: Conditions) -> None:
    with pytest.raises(ConfigError, match=r"expected to take 1\.235 hours"):
        run_sweep(make_sweep(0), replace(how, max_hours=1.0, expected_hours=1.23456))


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_hours_are_a_positive_number(hours: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-hours is .*; give a number of hours above 0"):
        Conditions(tmp_path, max_hours=hours)


def test_a_second_sweep_on_a_store_is_refused_at_once(make_sweep: MakeSweep, how: Conditions) -> None:
    with DirectoryLock(how.store / "sweeps"):
        began = time.monotonic()
        with pytest.raises(Busy, match=r"sweeps: in use by pid \d+ on host "):
            run_sweep(make_sweep(0), how)
        assert time.monotonic() - began < 1
    assert run_sweep(make_sweep(0), how).count("done") == 1


def test_a_damaged_result_is_made_again_from_the_record(make_sweep: MakeSweep, how: Conditions) -> None:
    sweep = make_sweep(0)
    run_sweep(sweep, how)
    file = Results(how.store, "toy").file(sweep.cells[0].id)
    file.write_bytes(file.read_bytes().replace(b"done", b"dome"))
    (state,) = run_sweep(sweep, how).cells
    assert state.result is not None
    assert (state.status, state.result.reused) == ("done", True)


def test_the_command_prints_the_table_and_ends_with_the_code_of_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*arguments: object) -> None:
        raise Diverged("NaN at step 5.")

    monkeypatch.setattr(experiment, "run", diverge)
    file, store = tmp_path / "s.yaml", tmp_path / "store"
    file.write_text(dump_yaml({"base": TINY_EXPERIMENT, "seeds": [0, 1]}))
    arguments = ["sweep", str(file), "--store", str(store), "--device", "cpu"]
    assert main([*arguments, "--quiet"]) == 7
    captured = capsys.readouterr()
    assert captured.err.startswith("blto: error[DIVERGED]: 2 of 2 cells failed; the first, base-s0-")
    assert captured.err.count("\n") == 1
    header, *rows = captured.out.splitlines()
    assert header.split()[:4] == ["CELL", "SEED", "STATUS", "ASR"]
    assert [row.split()[:3] for row in rows[:2]] == [["base", "0", "failed"], ["base", "1", "failed"]]
    assert main([*arguments, "--retry-failed"]) == 7
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("base-s0-")
    assert "begins (0 done, 1 running, 0 failed, 1 waiting; elapsed 0:00:00, expected end unknown)" in lines[0]
    assert "failed: error[DIVERGED]: NaN at step 5. after 0:00:00" in lines[1]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 5, r"error\[BUSY\]: .*sweeps: in use by pid \d+ on host .*\. Wait for it"),
        (["--max-hours", "0.5", "--expected-hours", "2"], 2, r"error\[CONFIG\]: --max-hours is 0.5, but cell base-s3-"),
    ],
)
def test_a_store_in_use_and_a_time_too_short_are_one_line_and_nothing_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    file, store = tmp_path / "s.yaml", tmp_path / "store"
    file.write_text(dump_yaml({"base": TINY_EXPERIMENT, "seeds": [3]}))
    with DirectoryLock(store / "sweeps"):
        assert main(["sweep", str(file), "--store", str(store), "--device", "cpu", "--quiet", *options]) == code
    captured = capsys.readouterr()
    assert re.search(said, captured.err)
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert [path.name for path in store.iterdir()] == ["sweeps"]


def test_a_cell_is_its_experiment_resumed_on_the_shared_store(
    make_sweep: MakeSweep, how: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[ExperimentSpec, Environment]] = []

    def run(spec: ExperimentSpec, environment: Environment) -> RunRecord:
        given.append((spec, environment))
        environment.progress.say("a line")
        return RunRecord(run_id=spec.run_id, spec=spec.model_dump(mode="json"), metrics={}, took=False)

    monkeypatch.setattr(experiment, "run", run)
    sweep = make_sweep(0, 1)
    assert run_sweep(sweep, replace(how, work=run_cell, data_root=Path("data"))).count("done") == 2
    (first, where), (second, there) = given
    assert [first, second] == [cell.spec for cell in sweep.cells]
    assert (where.store.root, where.data_root, where.device, where.resume) == (how.store, Path("data"), "cpu", True)
    assert where.store.group, "else two workers would refuse each other's stages"
    assert where.store.group == there.store.group
