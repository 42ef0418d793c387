"""Exact nearest neighbours: the bank passes once, in blocks that stay in the cache; a query keeps a few candidates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blto.runtime.kernels import kernel, split

Array = npt.NDArray[Any]

QUERIES, KEYS = 512, 1024  # a block of products: 2 MiB of float32, a core's second-level cache
LANES = 16  # similarities looked at together: most groups hold no candidate, and one comparison says so


def nearest(keys: Tensor, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The k largest inner products of each query with the keys, block of queries by block.

    They are those of a full sort, in no order; of equal products at the border the lower key index is taken. Faster
    than a matrix product and `topk`, whose (M, N) matrix does not fit a cache. Memory does not grow with M.

    Args:
        keys: float32 (N, D), finite, on the CPU.
        queries: float32 (M, D), finite, on the CPU.
        k: 1 to N.

    Yields:
        Products float32 (B, k) and key indices int64 (B, k) of the next B queries.
    """
    room = min(4 * k, len(keys)) + LANES
    products = torch.empty(QUERIES * KEYS)
    for begin in range(0, len(queries), QUERIES):
        block = queries[begin : begin + QUERIES]
        values, indices = np.empty((len(block), room), np.float32), np.empty((len(block), room), np.int64)
        counts, floors = np.zeros(len(block), np.int64), np.full(len(block), -np.inf, np.float32)
        for start in range(0, len(keys), KEYS):
            part = keys[start : start + KEYS]
            similar = products[: len(block) * len(part)].view(len(block), len(part))
            torch.mm(block, part.T, out=similar)
            split(collect, len(block), similar.numpy(), start, k, values, indices, counts, floors)
        split(finish, len(block), k, values, indices, counts)
        yield torch.from_numpy(values[:, :k]), torch.from_numpy(indices[:, :k])


@kernel()
def any_above(row: Array, start: int, floor: Any) -> bool:
    """Whether one of the `LANES` entries from `start` exceeds `floor`; without a branch, so it is vectorised."""
    found = False
    for i in range(LANES):  # a constant count
        found |= row[start + i] > floor
    return found


@kernel()
def collect(
    products: Array,
    first: int,
    k: int,
    values: Array,
    indices: Array,
    counts: Array,
    floors: Array,
    begin: int,
    end: int,
) -> None:
    """Append the products that may be among a query's k largest, for queries `begin` to `end`.

    Args:
        products: (B, n) with the keys `first` to `first + n`; n divisible by `LANES` except in the bank's last block.
        k: how many are sought.
        values, indices: (B, room) candidates in the order of the keys, cut down to k whenever room runs out.
        counts: (B,) candidates held.
        floors: (B,) the k-th largest at the last cut: a product must exceed it, as an equal one has a higher index.
    """
    work = np.empty(values.shape[1], np.float32)
    n, room = products.shape[1], values.shape[1]
    whole = n - n % LANES
    for q in range(begin, end):
        row, kept, keys, count, floor = products[q], values[q], indices[q], counts[q], floors[q]
        for start in range(0, whole, LANES):
            if any_above(row, start, floor):
                count = append(row, start, start + LANES, first, floor, kept, keys, count)
                if count + LANES > room:
                    count, floor = k, keep_largest(kept, keys, count, k, work)
        count = append(row, whole, n, first, floor, kept, keys, count)  # the last block's rest: there is room
        counts[q], floors[q] = count, floor


@kernel()
def append(row: Array, start: int, stop: int, first: int, floor: Any, values: Array, indices: Array, count: int) -> int:
    """Append what exceeds `floor` among the entries `start` to `stop`; returns the new count."""
    for i in range(start, stop):  # always write, sometimes advance: no branch to mispredict
        values[count], indices[count] = row[i], first + i
        count += row[i] > floor
    return count


@kernel()
def finish(k: int, values: Array, indices: Array, counts: Array, begin: int, end: int) -> None:
    """Leave exactly k candidates to queries `begin` to `end`."""
    work = np.empty(values.shape[1], np.float32)
    for q in range(begin, end):
        keep_largest(values[q], indices[q], counts[q], k, work)


@kernel()
def keep_largest(values: Array, indices: Array, count: int, k: int, work: Array) -> Any:
    """Move the k largest of `count` values to the front, in their order, equal ones from the left; the smallest."""
    smallest = kth_largest(values, count, k, work)
    ties = k
    for i in range(count):
        ties -= values[i] > smallest
    end = 0
    for i in range(count):
        value = values[i]
        tie = (value == smallest) & (ties > 0)
        ties -= tie
        values[end], indices[end] = value, indices[i]
        end += tie | (value > smallest)
    return smallest


@kernel()
def kth_largest(values: Array, count: int, k: int, work: Array) -> Any:
    """The k-th largest of `count` finite values, which stay as they are: Hoare's selection, on a copy in `work`."""
    work[:count] = values[:count]
    low, high, place = 0, count - 1, k - 1
    while low < high:
        a, b, pivot = work[low], work[high], work[(low + high) // 2]
        pivot = max(min(a, b), min(max(a, b), pivot))  # the median of three: sorted input is no bad case
        i, j = low, high
        while i <= j:
            while work[i] > pivot:
                i += 1
            while work[j] < pivot:
                j -= 1
            if i <= j:
                work[i], work[j] = work[j], work[i]
                i, j = i + 1, j - 1
        if place <= j:
            high = j
        elif place >= i:
            low = i
        else:
            break
    return work[place]
