"""Files as bad disks, bad transfers and bad editors leave them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def mutants(data: bytes, count: int) -> Iterator[bytes]:
    """`count` damaged copies: a bit, a stretch overwritten, cut out, doubled or swapped in, or the end missing."""
    rng = np.random.default_rng(len(data))
    for number in range(count):
        start, other = (int(place) for place in rng.integers(0, len(data), 2))
        end = min(len(data), start + int(rng.integers(1, 65)))
        piece = data[start:end]
        yield (
            data[:start] + bytes([data[start] ^ 1 << int(rng.integers(8))]) + data[start + 1 :],
            data[:start] + bytes(len(piece)) + data[end:],
            data[:start] + b"\xff" * len(piece) + data[end:],
            data[:start] + data[end:],
            data[:end] + piece + data[end:],
            data[:start] + data[other : other + len(piece)] + data[end:],
            data[:start],
        )[number % 7]
