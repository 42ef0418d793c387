"""How training speed and memory grow with the batch, the net, the images and the processes. To run: make bench-scaling

SimCLR on ResNet-18 (CIFAR stem) end to end: order, views and steps as the pretraining loop takes them, over images in a
memory-mapped file. Every cell is a process of its own, so that its memory is its own; those of a cell that has several
start together once all have warmed up. The cost of each stage of a whole experiment comes last (`stages`).

Each finished cell is written to benchmarks/results/scaling.json at once. A call that was cut off goes on there, and a
later call measures again what strangers disturbed. Under 15 minutes on two quiet cores; needs no data.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peers, timing
from benchmarks.stages import stage_costs
from blto.data.cache import map_array
from blto.data.images import ImageSet, random_access
from blto.files import read_json, write_json
from blto.models.native.library import find_kernels
from blto.runtime.device import processor_name

RESULT = Path(__file__).parent / "results" / "scaling.json"
FEW_IMAGES, MOST_IMAGES = 50_000, 10_000_000
"""Anonymous memory with the second, over that with the first, is to be at most 1.1."""
STAGES = "stages"


@dataclass(frozen=True)
class Cell:
    """One point to measure; the defaults are the one through which the axes of batch, width and images pass."""

    batch_size: int = 256
    width: int = 16
    resolution: int = 32
    images: int = FEW_IMAGES
    threads: int = 2
    processes: int = 1

    @property
    def key(self) -> str:
        """Its name in the record."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


def cells() -> Iterator[Cell]:
    """Every axis in turn; some meet."""
    yield from (Cell(batch_size=size) for size in (32, 64, 128, 256, 512, 1024))
    yield from (Cell(width=width) for width in (32, 64))
    yield from (Cell(resolution=side, batch_size=32, images=1000) for side in (32, 64, 96, 224))
    yield from (Cell(images=count) for count in (1000, 10_000, 100_000, 1_000_000, MOST_IMAGES))
    yield from (Cell(threads=1, processes=count) for count in (1, 2))


def image_file(folder: Path, cell: Cell) -> Path:
    """A file of the cell's images: noise, or, where they are more than FEW_IMAGES, zeros that take no room."""
    path, shape = folder / "images.npy", (cell.images, 3, cell.resolution, cell.resolution)
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if cell.images <= FEW_IMAGES:
        pixels[:] = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return path


def train(cell: Cell, file: Path, seconds: float) -> dict[str, float]:
    """In a child: warm up, wait for the parent's word, then train for `seconds` and two steps at least."""
    torch.set_num_threads(cell.threads)
    images = ImageSet(map_array(file), None, (), "noise")
    step = peers.ours(images, cell.width, cell.batch_size, steps=1)
    step()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    started, cpu, steps, done = time.perf_counter(), time.process_time(), 0, 0
    with random_access(images.images):
        while steps < 2 or time.perf_counter() - started < seconds:
            done += step()
            steps += 1
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    status = Path("/proc/self/status").read_text()
    memory = {name: int(kib) / 1024 for name, kib in re.findall(r"^(RssAnon|VmHWM):\s*(\d+) kB$", status, re.MULTILINE)}
    return {
        "images_per_second": done / elapsed,
        "cpu_seconds_per_1000_images": 1000 * cpu / done,
        "anonymous_mib": memory["RssAnon"],
        "peak_mib": memory["VmHWM"],
    }


def measure(cell: Cell, seconds: float) -> dict[str, Any]:
    """Run the processes of a cell side by side: rates and memory are summed over them."""
    with tempfile.TemporaryDirectory() as folder:
        file = image_file(Path(folder), cell)
        arguments = ("--train", json.dumps(asdict(cell)), "--file", str(file), "--seconds", str(seconds))
        children = [child(cell.threads, *arguments) for _ in range(cell.processes)]
        for each in children:
            assert each.stdout
            if each.stdout.readline() != "ready\n":
                sys.exit(f"{cell.key}: a process ended before it had warmed up; see above.")
        started, (busy, own) = time.perf_counter(), timing.cpu_seconds()
        # To all before any is waited for: `communicate` would let them train one after the other.
        for each in children:
            assert each.stdin
            each.stdin.write("go\n")
            each.stdin.flush()
        found = [json.loads(each.communicate()[0]) for each in children]
    busy_after, own_after = timing.cpu_seconds()
    foreign = (busy_after - busy - (own_after - own)) / (time.perf_counter() - started)
    total = {name: sum(one[name] for one in found) for name in ("images_per_second", "anonymous_mib", "peak_mib")}
    cpu = sum(one["cpu_seconds_per_1000_images"] for one in found) / len(found)
    return {**asdict(cell), **total, "cpu_seconds_per_1000_images": cpu, "foreign": max(0.0, foreign)}


def measure_stages(images: int, steps: int) -> dict[str, Any]:
    """The cost of the stages, from a process of its own."""
    started, (busy, own) = time.perf_counter(), timing.cpu_seconds()
    threads = os.cpu_count() or 1
    found = json.loads(
        child(threads, "--stages", "--stage-images", str(images), "--steps", str(steps)).communicate()[0]
    )
    busy_after, own_after = timing.cpu_seconds()
    foreign = (busy_after - busy - (own_after - own)) / (time.perf_counter() - started)
    return {"costs": found, "images": images, "steps": steps, "foreign": max(0.0, foreign)}


def child(threads: int, *arguments: str) -> subprocess.Popen[str]:
    """This module as a process with its own number of threads."""
    command = [sys.executable, "-m", "benchmarks.scaling", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def summary(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The two numbers that were asked for, as far as their cells are there."""
    ratios = {
        "anonymous_memory_most_over_few_images": ("anonymous_mib", Cell(images=MOST_IMAGES), Cell()),
        "two_processes_over_two_threads": ("images_per_second", Cell(threads=1, processes=2), Cell()),
    }
    return {
        name: found[over.key][value] / found[under.key][value]
        for name, (value, over, under) in ratios.items()
        if over.key in found and under.key in found
    }


def missing(found: dict[str, dict[str, Any]], key: str) -> bool:
    """Whether a part is still to be measured, or was disturbed."""
    return key not in found or found[key]["foreign"] > timing.FOREIGN_LIMIT


def complete(record: dict[str, Any], given: argparse.Namespace) -> None:
    """Measure what `record` lacks; write it after each part."""

    def note(section: str, key: str, part: dict[str, Any]) -> None:
        record[section][key] = part
        record["summary"] = summary(record["cells"])
        write_json(given.out, record)
        sys.stdout.write(f"{key}: {json.dumps(part)}\n")
        sys.stdout.flush()

    for cell in {cell.key: cell for cell in cells()}.values():
        if re.search(given.only, cell.key) and missing(record["cells"], cell.key):
            note("cells", cell.key, measure(cell, given.seconds))
    if re.search(given.only, STAGES) and missing(record["parts"], STAGES):
        note("parts", STAGES, measure_stages(given.stage_images, given.steps))


def main() -> None:
    """Measure what is missing and write it; or, as a child, measure one cell and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seconds", type=float, default=6, help="that each cell trains for")
    parser.add_argument("--stage-images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=40, help="of the bi-level loop")
    parser.add_argument("--only", default="", help="a regular expression that the names of cells must match")
    for internal in ("--train", "--file"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--stages", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        json.dump(train(Cell(**json.loads(given.train)), Path(given.file), given.seconds), sys.stdout)
        return
    if given.stages:
        json.dump(stage_costs(given.stage_images, given.steps), sys.stdout)
        return
    machine = {"processor": processor_name("cpu"), "cores": os.cpu_count(), "torch": torch.__version__}
    conditions = {"machine": machine, "engine": find_kernels()[1], "seconds": given.seconds}
    record: dict[str, Any] = read_json(given.out) if given.out.exists() else {**conditions, "cells": {}, "parts": {}}
    if {key: record[key] for key in conditions} != conditions:
        sys.exit(f"{given.out} was begun with another processor, torch, engine or time; remove it to start again.")
    complete(record, given)
    for name, value in record["summary"].items():
        sys.stdout.write(f"{name}: {value:.3f}\n")


if __name__ == "__main__":
    main()
