"""Named seed streams: every random choice is a function of the run's seed and of what it is for.

Changing the attack draws nothing from the victim's stream, so a clean and a poisoned run of one seed are a pair. Inside
training nothing is drawn from a stream's *state*: batch order is a function of (seed, epoch) and augmentation of
(seed, epoch, sample, view), which is what makes a resumed run equal an uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

Stream = Literal["data", "select", "trigger", "pretrain", "probe", "defense"]


def stream_seed(seed: int, stream: Stream, *parts: int | str) -> int:
    """A 63-bit seed for one purpose, from the run's seed, the stream's name and any further parts."""
    text = "/".join(str(part) for part in (seed, stream, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, stream: Stream, *parts: int | str) -> np.random.Generator:
    """A fresh NumPy generator (Philox, counter-based) for one purpose."""
    return np.random.Generator(np.random.Philox(stream_seed(seed, stream, *parts)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for the block (weights, dropout) and leave it afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
