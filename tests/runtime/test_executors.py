"""Worker processes: pinned, one thread each; one that dies fails its job alone; none outlives a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blto.errors import ConfigError, Interrupted
from blto.files.yaml import dump_yaml
from blto.pretraining.loop import pretrain
from blto.runtime.executors import build_executor
from blto.runtime.interrupts import StopRequest, stop_requests, stopping_at
from blto.runtime.jobs import Job, Outcome, attempt
from blto.runtime.workers import Processes
from blto.sweep.plan import read_sweep
from blto.sweep.running import Conditions, run_sweep
from tests.factories import random_images, tiny_recipe
from tests.sweep import toy
from tests.tiny_experiment import TINY_EXPERIMENT


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(*seeds: int) -> Path:
        path = tmp_path / "toy.yaml"
        path.write_text(dump_yaml({"base": TINY_EXPERIMENT, "seeds": list(seeds)}))
        return path

    return write


def test_a_worker_that_dies_fails_its_cell_and_the_others_go_on(file: Callable[..., Path], tmp_path: Path) -> None:
    sweep = read_sweep(file(0, 1, 2, 5, 3, 4))
    how = Conditions(tmp_path / "store", executor="processes", quiet=True, work=toy.deaths)
    result = run_sweep(sweep, how)
    assert [cell.status for cell in result.cells] == ["done", "failed", "failed", "failed", "done", "done"]
    killed, ended, gone = (cell.result for cell in result.cells[1:4])
    assert killed is not None
    assert ended is not None
    assert gone is not None
    assert (killed.code, killed.exit_code) == ("OUT-OF-MEMORY", 4)
    assert killed.error.startswith("its worker was killed, most likely for want of memory.")
    assert (ended.code, ended.exit_code, ended.error) == ("BUG", 70, "its worker ended by exit code 9.")
    assert (gone.code, gone.error) == ("BUG", "its worker ended by exit code 0."), "nobody asked it to"
    places = [path.read_text().split() for path in (tmp_path / "store" / "places").iterdir()]
    assert len(places) == 3
    assert all(place[1:] == ["1", "1"] and place[0] != str(os.getpid()) for place in places)


TWO_WORKERS = [min(os.sched_getaffinity(0))] * 2  # on one core, where there is no more


class Jobs:
    """A queue of given jobs that asks for a stop once `enough` of them have told something."""

    def __init__(self, jobs: list[Job], stop: StopRequest, enough: int = 100) -> None:
        self.jobs, self.stop, self.enough = list(jobs), stop, enough
        self.talking: set[str] = set()
        self.texts: list[str] = []
        self.outcomes: dict[str, Outcome] = {}

    def next(self) -> Job | None:
        return self.jobs.pop(0) if self.jobs else None

    def told(self, name: str, text: str) -> None:
        self.talking.add(name)
        self.texts.append(text)
        if len(self.talking) >= self.enough:
            self.stop.signal_number = signal.SIGINT

    def ended(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome


def test_a_stop_reaches_every_worker_and_each_ends_at_its_checkpoint(file: Callable[..., Path], tmp_path: Path) -> None:
    cells = read_sweep(file(0, 1, 2)).cells
    contents = [{"spec": cell.spec.model_dump(mode="json"), "store": str(tmp_path)} for cell in cells]
    stop = StopRequest()
    queue = Jobs([Job(str(i), content) for i, content in enumerate(contents)], stop, 2)
    Processes(toy.endless, TWO_WORKERS).run(queue, stop)
    assert set(queue.outcomes) == {"0", "1"}
    assert all(outcome.stopped and outcome.signal_number == signal.SIGTERM for outcome in queue.outcomes.values())


def test_workers_of_a_group_make_a_stage_once_and_wait_for_it(tmp_path: Path) -> None:
    content = {"store": str(tmp_path), "group": "a"}
    stop = StopRequest()
    queue = Jobs([Job(str(i), content) for i in range(4)], stop)
    Processes(toy.shared, TWO_WORKERS).run(queue, stop)
    assert [outcome.failure for outcome in queue.outcomes.values()] == [None] * 4
    assert toy.starts(tmp_path) == {"stage": 1}
    (text,) = queue.texts
    assert text.startswith("waits for craft-")


PARENT = """
import sys
from pathlib import Path
from blto.sweep.plan import read_sweep
from blto.sweep.running import Conditions, run_sweep
from tests.sweep import toy
run_sweep(read_sweep(Path(sys.argv[1])), Conditions(Path(sys.argv[2]), executor="processes", work=toy.silent))
"""


def lives(pid: str) -> bool:
    """Whether a process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.full  # a process that loads torch
def test_no_worker_outlives_a_killed_sweep(file: Callable[..., Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-c", PARENT, str(file(0, 1)), str(store)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2]) as parent:
        deadline = time.monotonic() + 120
        while not toy.starts(store):
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert workers
        parent.kill()
    time.sleep(0.5)
    assert not [pid for pid in workers if lives(pid)]
    how = Conditions(store, quiet=True, work=toy.work)
    assert run_sweep(read_sweep(file(0, 1)), how).count("done") == 2


def test_an_executor_says_what_it_cannot_do() -> None:
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match='unknown executor "process"; did you mean "processes"'):
        build_executor("process", toy.work)
    with pytest.raises(ConfigError, match="the serial executor has one"):
        build_executor("serial", toy.work, workers=2)
    with pytest.raises(ConfigError, match=f"--workers is {cores + 1}, but {cores} cores may be used"):
        build_executor("processes", toy.work, workers=cores + 1)
    with pytest.raises(ValueError, match="cannot import"):
        build_executor("processes", lambda content, tell: None)


def test_what_goes_wrong_in_a_job_is_its_outcome() -> None:
    def fail(error: BaseException) -> Outcome:
        def work(content: object, tell: object) -> None:
            raise error

        return attempt(work, Job("a", {}), print)

    assert fail(Interrupted("stopped.", signal_number=15)).signal_number == 15
    assert [fail(KeyboardInterrupt(*given)).signal_number for given in ((), (15,))] == [2, 15]
    memory, bug = fail(RuntimeError("can't allocate memory")).failure, fail(KeyError("x")).failure
    assert memory is not None
    assert bug is not None
    assert (memory.code, bug.code, bug.exit_code) == ("OUT-OF-MEMORY", "BUG", 70)
    assert "Traceback" in bug.trace


def test_a_signal_to_an_inner_block_is_a_request_to_all() -> None:
    with stop_requests() as outer:
        with stop_requests() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner
        assert outer.signal_number == signal.SIGTERM
        with stop_requests() as later:
            assert later, "a stage that begins after the signal stops as well"
    with stop_requests() as fresh:
        assert not fresh


def test_a_training_stops_in_time_and_keeps_its_state(tmp_path: Path) -> None:
    images = random_images().without_labels()
    with stopping_at(time.monotonic()), pytest.raises(Interrupted, match="stopped at step 1 of 10") as stopped:
        pretrain(images, tiny_recipe(), seed=0, device="cpu", folder=tmp_path)
    assert stopped.value.signal_number is None
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_a_moment_is_a_request_without_a_signal() -> None:
    with stopping_at(time.monotonic() + 0.05), stop_requests() as stop:
        assert not stop
        time.sleep(0.06)
        assert stop
        assert stop.signal_number is None
    with stopping_at(None), stop_requests() as stop:
        assert not stop
