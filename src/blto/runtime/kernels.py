"""Compiled loops on CPUs: numba functions on one thread each, without the GIL, and a batch split over threads.

Their machine code is kept on disk where that is possible, and they work where it is not. numba's own parallel layers
are not used: the portable one must not be entered by two threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from numba import njit

from blto.files import show
from blto.runtime.progress import Progress

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

CHUNK = 16  # the fewest samples that are worth a thread of their own

# What LLVM may do to vectorise sums and fuse multiply-adds. Not `arcp`: x / 255 must stay an exact division.
RELAXED = {"contract", "nsz", "reassoc"}


def kernel(*, relaxed: bool = False) -> Callable[[Kernel], Kernel]:
    """A nogil numba function, its machine code cached on disk; where it cannot be, one line says so and it is not."""

    def decorate(function: Kernel) -> Kernel:
        # numpy's divisions: a check for zero, which raises, would keep a loop from being vectorised
        options = {"nogil": True, "fastmath": RELAXED if relaxed else False, "error_model": "numpy"}
        folder = str(Path(function.__code__.co_filename).parent)
        try:
            compiled = njit(cache=True, **options)(function)
        except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
            warn_not_kept(folder)
            return cast(Kernel, njit(**options)(function))
        for name in ("load_overload", "save_overload"):
            setattr(compiled._cache, name, forgiving(getattr(compiled._cache, name), folder))
        return cast(Kernel, compiled)

    return decorate


def forgiving(access: Callable[..., Any], folder: str) -> Callable[..., Any]:
    """The same access to numba's cache, which yields nothing where the disk is full or the folder has gone since."""

    def access_or_warn(*arguments: Any) -> Any:
        try:
            return access(*arguments)
        except OSError:
            warn_not_kept(folder)
            return None

    return access_or_warn


@cache
def warn_not_kept(folder: str) -> None:
    """Once a process, that the code compiled from a folder's sources is not kept."""
    Progress().say(
        f"blto: warning: compiled code is not kept: there is no room or no permission to write to {show(folder)}, so "
        "every process compiles for some seconds; set NUMBA_CACHE_DIR to a folder that can be written."
    )


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
