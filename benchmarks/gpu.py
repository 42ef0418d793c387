"""Speed of pretraining on CUDA against lightly's model, both on views that the GPU makes. To run: benchmarks/gpu.sh

SimCLR on ResNet-18 at full width, fp32 and bf16. Needs no data set: the images are noise, which takes as long. Under
torchrun every process has the batch named, and the rates are those of all processes. Writes results/gpu.json.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peers, timing
from blto.data.images import ImageSet
from blto.files import write_json
from blto.runtime.device import processor_name
from blto.runtime.distributed import process_count, process_number

RESULT = Path(__file__).parent / "results" / "gpu.json"
OTHER = "lightly's model on our data"


def noise(count: int, size: int = 32) -> ImageSet:
    """Images without labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return ImageSet(pixels, None, (), "noise")


def finished(work: Callable[[], int], device: str) -> Callable[[], int]:
    """The same work, over when the device has done it."""

    def until_done() -> int:
        images = work()
        if device == "cuda":
            torch.cuda.synchronize()
        return images

    return until_done


def training(
    images: ImageSet, width: int, batch_size: int, *, bf16: bool, device: str, steps: int, rounds: int
) -> dict[str, Any]:
    """Ours and lightly's model in turns; `batch_size` is that of each process."""
    whole = batch_size * process_count()
    candidates = {
        "ours": peers.ours(images, width, whole, steps, precision="bf16" if bf16 else "fp32", device=device),
        OTHER: peers.lightly_on_our_data(images, width, whole, steps, bf16=bf16, device=device),
    }
    turns = timing.interleave({name: finished(work, device) for name, work in candidates.items()}, rounds=rounds)
    return {
        "title": f"ResNet-18 width {width}, batch {batch_size}, {'bf16' if bf16 else 'fp32'}",
        "rates": {name: timing.rate(of_name, math.inf) for name, of_name in turns.items()},
        "ratio": timing.compare(turns, "ours", OTHER, math.inf),  # the host's other work is not the GPU's
        "turns": timing.rows(turns),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if "RANK" in os.environ:  # torchrun has set it
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl")
    images, parts = noise(50_000), []
    for batch_size in (256, 512):
        for bf16 in (False, True):
            how = {"bf16": bf16, "device": "cuda", "steps": given.steps, "rounds": given.rounds}
            part = training(images, 64, batch_size, **how)
            parts.append(part)
            if process_number() == 0:
                ratio, rates = part["ratio"], part["rates"]
                sys.stdout.write(
                    f"{part['title']}: {rates['ours']:.0f} images/s, {ratio['ratio']:.2f} times {OTHER} "
                    f"[{ratio['low']:.2f}, {ratio['high']:.2f}]\n"
                )
                sys.stdout.flush()
    machine = {"gpu": processor_name("cuda"), "processes": process_count(), "torch": torch.__version__}
    if process_number() == 0:
        write_json(given.out, {"machine": {**machine, "cuda": torch.version.cuda}, "parts": parts})
    if process_count() > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
