"""Compiled loops on CPUs: numba functions on one thread each, without the GIL, and a batch split over threads.

numba's own parallel layers are not used: the portable one must not be entered by two threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from numba import njit

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

CHUNK = 16  # the fewest samples that are worth a thread of their own

# What LLVM may do to vectorise sums and fuse multiply-adds. Not `arcp`: x / 255 must stay an exact division.
RELAXED = {"contract", "nsz", "reassoc"}


def kernel(*, relaxed: bool = False) -> Callable[[Kernel], Kernel]:
    """A nogil numba function, its machine code cached on disk where numba finds a place that can be written."""

    def decorate(function: Kernel) -> Kernel:
        flags = RELAXED if relaxed else False
        try:
            return cast(Kernel, njit(cache=True, nogil=True, fastmath=flags)(function))
        except RuntimeError:  # neither __pycache__ nor the user's cache directory can be written
            return cast(Kernel, njit(nogil=True, fastmath=flags)(function))

    return decorate


def split(kernel: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `kernel(*arguments, start, stop)` over parts of 0 to `count`, on torch's number of threads."""
    threads = max(1, min(torch.get_num_threads(), count // CHUNK))
    first, *others = pairwise(count * part // threads for part in range(threads + 1))
    running = [pool(os.getpid()).submit(kernel, *arguments, *part) for part in others]
    kernel(*arguments, *first)
    for other in running:
        other.result()


@cache
def pool(process: int) -> ThreadPoolExecutor:
    """Helper threads, started as needed and kept; one pool a process, as threads do not survive a fork."""
    return ThreadPoolExecutor(thread_name_prefix=f"blto-{process}")
