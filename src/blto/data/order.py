"""The order in which an epoch visits the images: a keyed permutation that is computed where it is read, not stored.

A Feistel network over pairs (left, right) of numbers below a, with a the smallest integer whose square holds the set:
each round maps (left, right) to (right, left + F(right) mod a), a bijection whatever F is. A value that falls outside
the set is permuted again until it lies inside. Both ideas: Black and Rogaway, Ciphers with Arbitrary Finite Domains,
CT-RSA 2002. So an epoch over any number of images needs the memory of one batch.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import numpy as np

from blto.data.view_backends.fast import GOLDEN, mix
from blto.runtime.kernels import kernel

ROUNDS = 16
"""After 12, positions and neighbours in sets of 2 to 30 images passed for uniform over 10^6 keys, or nearly."""

ORDER = "feistel-16"
"""Names this order in the identity of a checkpoint: one begun in another cannot go on in it."""

Rows = np.ndarray[Any, np.dtype[np.int64]]


def permuted(start: int, stop: int, *, size: int, key: int) -> Rows:
    """Elements `start` to `stop` of the permutation of 0 to `size` - 1 that `key` names, int64 (stop - start,).

    Raises:
        ValueError: not 0 <= start <= stop <= size.
    """
    if not 0 <= start <= stop <= size:
        raise ValueError(f"elements {start} to {stop} of {size} were asked for; give 0 <= start <= stop <= {size}")
    out = np.empty(stop - start, np.int64)
    if start < stop:
        permute(start, size, isqrt(size - 1) + 1, np.uint64(key), out)
    return out


@kernel()
def permute(start: int, size: int, side: int, key: Any, out: Any) -> None:
    """Fill `out` with the elements from `start` on; `side` ** 2 is at least `size`."""
    base = np.uint64(side)
    for index in range(len(out)):
        value = np.uint64(start + index)
        while True:
            left, right = value // base, value % base
            for number in range(ROUNDS):
                shift = mix(mix(key + GOLDEN * np.uint64(number + 1)) + right) % base
                left, right = right, (left + shift) % base
            value = left * base + right
            if value < np.uint64(size):
                break
        out[index] = np.int64(value)
