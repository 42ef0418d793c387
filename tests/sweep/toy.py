"""A sweep whose cells take milliseconds: the work is injected, everything around it is real. Imports no torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from blto.errors import Busy, Diverged, Interrupted, ResourceExhausted
from blto.files import DirectoryLock, make_directory, read_json, write_json
from blto.files.atomic import disk_errors
from blto.records import RunStore
from blto.runtime.interrupts import stop_requests
from blto.runtime.jobs import Tell

STEPS = 4


def metrics(seed: int) -> dict[str, Any]:
    return {"linear": {"asr": {"value": 1 / (seed + 2), "low": 0.0, "high": 1.0, "n": 10}}}


def starts(store: Path) -> dict[str, int]:
    """How often the work on each run was begun."""
    return {file.name: file.stat().st_size for file in (store / "begun").glob("*")}


def note(store: Path, name: str) -> None:
    """One more byte in a file: the work on a run begins."""
    make_directory(store / "begun")
    with disk_errors(store):
        descriptor = os.open(store / "begun" / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, b"x")
        finally:
            os.close(descriptor)


def work(content: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Four steps with a checkpoint after each, then a record with a number that tells one making from another."""
    store, seed = Path(content["store"]), content["spec"]["seed"]
    name = RunStore.run_id(content["spec"])
    note(store, name)
    folder = store / name
    with DirectoryLock(folder, group=content["group"]):
        if (folder / "record.json").exists():
            return {"metrics": metrics(seed), "reused": True}
        kept = folder / "checkpoint.json"
        step = read_json(kept)["step"] if kept.exists() else 0
        with stop_requests() as stop:
            while step < STEPS:
                time.sleep(0.001)
                step += 1
                write_json(kept, {"step": step})
                tell(f"step {step}")
                if stop:
                    raise Interrupted(f"stopped at step {step}.", signal_number=stop.signal_number)
        write_json(folder / "record.json", {"seed": seed, "made": os.urandom(8).hex()})
        return {"metrics": metrics(seed), "reused": False}


def mishaps(content: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """As `work`, but the seeds from 1 on meet what can go wrong."""
    seed = content["spec"]["seed"]
    if seed == 1:
        raise Diverged("NaN at step 5.")
    if seed == 2:
        raise KeyError("a bug")
    if seed == 3:
        raise MemoryError
    if seed == 4:
        raise Busy("stages/craft-1: in use by pid 7 on host x since then.")
    if seed == 5:
        raise ResourceExhausted("runs/a: no room to write.")
    if seed == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return work(content, tell)


def deaths(content: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """As `work`, in a worker that seed 1 kills and seeds 2 and 5 end, and that says where it runs."""
    seed = content["spec"]["seed"]
    if seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed in (2, 5):
        os._exit({2: 9, 5: 0}[seed])
    place = f"{os.getpid()} {len(os.sched_getaffinity(0))} {os.environ['OMP_NUM_THREADS']}"
    make_directory(Path(content["store"]) / "places")
    (Path(content["store"]) / "places" / str(seed)).write_text(place)
    return work(content, tell)


def shared(content: dict[str, Any], tell: Tell) -> None:
    """Make one stage that every job needs, slowly."""
    store = Path(content["store"])
    with RunStore(store, group=content["group"]).stage("craft", {"seed": 1}).making(tell) as needed:
        if needed:
            note(store, "stage")
            time.sleep(0.5)
            RunStore(store).stage("craft", {"seed": 1}).commit({})


def silent(content: dict[str, Any], tell: Tell) -> None:
    """Work that says nothing for half a minute, so that it cannot notice that nobody listens."""
    note(Path(content["store"]), RunStore.run_id(content["spec"]))
    time.sleep(30)


def endless(content: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Steps until it is asked to stop."""
    note(Path(content["store"]), RunStore.run_id(content["spec"]))
    with stop_requests() as stop:
        for step in range(3000):
            tell(f"step {step}")
            if stop:
                raise Interrupted(f"stopped at step {step}.", signal_number=stop.signal_number)
            time.sleep(0.01)
    raise AssertionError("nobody asked")
