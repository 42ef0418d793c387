"""A scan goes on after a kill and a signal, gives the same wherever it runs, and does not grow with the images."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blto.audit.pile import chunks
from blto.errors import BltoError, Busy, ConfigError, Interrupted
from blto.runtime import on_ray
from blto.runtime.executors import WITH_RAY, Serial, build_executor
from blto.runtime.on_ray import OnRay
from blto.runtime.workers import Processes
from tests.audit import piles
from tests.audit.piles import patched, scanned, shapes, without_times, write

TWO_WORKERS = [min(os.sched_getaffinity(0))] * 2  # on one core, where there is no more


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "IMAGES", 20)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "pile", patched()[:200]), write(tmp_path / "clean", shapes().images[400:600])


def attempt(places: tuple[Path, Path], store: Path, seconds: float) -> bool:
    """Scan in a child for at most `seconds`; whether it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            scanned(*places, store)
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.full)])
def test_random_kills_lose_nothing_and_repeat_nothing(kills: int, places: tuple[Path, Path], tmp_path: Path) -> None:
    rng, happened, number = random.Random(kills), 0, 0
    began = time.monotonic()
    whole = without_times(scanned(*places, tmp_path / "straight"))
    seconds = time.monotonic() - began
    while happened < kills:
        store, finished = tmp_path / str(number), False
        number += 1
        while not finished:
            before = {file: file.read_bytes() for file in store.rglob(".part-*.json")}
            finished = attempt(places, store, rng.uniform(0, 0.7 * seconds))
            happened += not finished
            if not finished:
                for file, content in before.items():
                    assert not file.exists() or file.read_bytes() == content, "what was done is not done again"
            if happened >= kills:
                break
        assert without_times(scanned(*places, store)) == whole
        assert not [*store.rglob(".part-*"), *store.rglob("*.blto-tmp")]


@pytest.mark.usefixtures("small_parts")
def test_a_signal_stops_after_the_part_in_hand_and_the_same_call_goes_on(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr("blto.audit.pile.working.score_chunk", piles.score_and_ask_to_stop)
        with pytest.raises(Interrupted, match="stopped with 1 of 20 parts done") as stopped:
            scanned(*places, store)
    assert stopped.value.exit_code == 143
    assert len(list(store.rglob(".part-*"))) == 1
    begun = []

    def counting(content: Any, tell: Any) -> Any:
        begun.append(1)
        return chunks.score_chunk(content, tell)

    monkeypatch.setattr("blto.audit.pile.working.score_chunk", counting)
    scanned(*places, store)
    assert len(begun) == 19


@pytest.mark.usefixtures("small_parts")
def test_processes_give_what_one_process_gives_and_a_killed_one_is_replaced(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serial = without_times(scanned(*places, tmp_path / "one"))
    monkeypatch.setattr("blto.audit.pile.working.score_chunk", piles.score_and_die_once)
    many = scanned(*places, tmp_path / "many", executors=partial(Processes, cores=TWO_WORKERS))
    assert (tmp_path / "died").exists()
    assert without_times(many) == serial
    monkeypatch.setattr("blto.audit.pile.working.score_chunk", piles.score_and_die)
    with pytest.raises(BltoError, match="its worker was killed") as failed:
        scanned(*places, tmp_path / "never", executors=partial(Processes, cores=TWO_WORKERS))
    assert (failed.value.code, failed.value.exit_code) == ("OUT-OF-MEMORY", 4)


@pytest.mark.usefixtures("small_parts")
def test_two_scans_of_the_same_do_not_meet(places: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    def scoring(content: Any, tell: Any) -> Any:
        with pytest.raises(Busy, match="in use by pid"):
            scanned(*places, tmp_path / "store")
        return chunks.score_chunk(content, tell)

    monkeypatch.setattr("blto.audit.pile.working.score_chunk", scoring)
    scanned(*places, tmp_path / "store")


MEASURED = """
import re, sys
from pathlib import Path
from tests.audit.piles import scanned
detectors = [{"name": "frequency_screening", "reference": 50}, {"name": "repeated_windows", "sample": 100}]
scanned(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), detectors=detectors)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])  # rusage has the parent's
"""


@pytest.mark.full
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Thrice as many images, 43 MB more of pixels; both are several parts."""

    def ppm(pixels: np.ndarray) -> bytes:
        return b"P6 64 64 255\n" + pixels.tobytes()

    peaks, draw = [], np.random.default_rng(0)
    clean = write(tmp_path / "clean", draw.integers(0, 256, (200, 3, 64, 64), dtype=np.uint8), ppm)
    for count in (1500, 5000):
        pile = write(tmp_path / str(count), draw.integers(0, 256, (count, 3, 64, 64), dtype=np.uint8), ppm)
        given = [sys.executable, "-c", MEASURED, str(pile), str(clean), str(tmp_path / "store")]
        done = subprocess.run(given, capture_output=True, text=True, timeout=600, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 12, f"{peaks} MiB"


ray_quiet = pytest.mark.filterwarnings("ignore")  # Ray's own


class Killer(threading.Thread):
    """Waits until both workers have work in hand, then has one of them killed."""

    def __init__(self, begun: Path, kill: Callable[[int], None]) -> None:
        super().__init__()
        self.begun, self.kill, self.killed = begun, kill, 0

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not self.killed:
            begun = sorted(self.begun.glob("*"), key=lambda file: file.stat().st_mtime_ns)
            if len(begun) >= 6 and len({file.name.partition("-")[0] for file in begun}) >= 2:
                self.killed = int(begun[-1].name.partition("-")[0])
                self.kill(self.killed)
            time.sleep(0.02)


@pytest.mark.full
@ray_quiet
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("what", ["worker", "machine"])
def test_a_ray_cluster_of_two_of_which_one_is_killed_gives_what_one_process_gives(
    what: str,
    places: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    serial = without_times(scanned(*places, tmp_path / "one"))
    monkeypatch.setattr("blto.audit.pile.working.score_chunk", piles.score_slowly)
    given: dict[str, Any] = {"workers": 2}
    if what == "worker":
        cluster = None
        killer = Killer(tmp_path / "begun", lambda pid: os.kill(pid, signal.SIGKILL))
    else:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        node, given = cluster.add_node(num_cpus=1), {"address": cluster.address}
        killer = Killer(tmp_path / "begun", lambda pid: cluster.remove_node(node, allow_graceful=False))
    killer.start()
    capfd.readouterr()
    try:
        found = scanned(*places, tmp_path / "many", executors=partial(OnRay, **given))
    finally:
        killer.join()
        if cluster is not None:
            cluster.shutdown()
    assert killer.killed
    assert capfd.readouterr().out == "", "standard output is for results"
    assert without_times(found) == serial
    begun = [file.name.partition("-") for file in (tmp_path / "begun").glob("*")]
    parts = [part for _, _, part in begun]
    assert len(set(parts)) == 20
    if what == "worker":  # a machine takes long to die: what it has in hand may be done by then
        assert len({pid for pid, _, _ in begun}) >= 3, "another one in the place of the killed one"
        assert len(parts) > 20, "what the killed one had in hand was begun again"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request"], ids=["silent", "another"])
def test_somebody_else_at_the_address_is_no_ray_cluster(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(on_ray, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            line, _ = server.accept()
            line.sendall(answer)
            time.sleep(0.4)
            line.close()

        other = threading.Thread(target=serve)
        other.start()
        with pytest.raises(ConfigError, match="no Ray cluster answers there"):
            build_executor("ray", chunks.score_chunk, address=f"127.0.0.1:{server.getsockname()[1]}", known=WITH_RAY)
        other.join()


def test_serial_is_what_others_are_compared_with() -> None:
    assert isinstance(build_executor("serial", chunks.score_chunk, known=WITH_RAY), Serial)
