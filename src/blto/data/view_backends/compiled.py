"""numba functions whose machine code is kept on disk where that is possible, and which work where it is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit

from blto.files import show
from blto.runtime.progress import Progress

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# What LLVM may do to vectorise sums and fuse multiply-adds. Not `arcp`: x / 255 must stay an exact division.
RELAXED = {"contract", "nsz", "reassoc"}


def kernel(*, relaxed: bool = False) -> Callable[[Kernel], Kernel]:
    """A nogil numba function, its machine code cached on disk; where it cannot be, one line says so and it is not."""

    def decorate(function: Kernel) -> Kernel:
        flags = RELAXED if relaxed else False
        folder = str(Path(function.__code__.co_filename).parent)
        try:
            compiled = njit(cache=True, nogil=True, fastmath=flags)(function)
        except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
            warn_not_kept(folder)
            return cast(Kernel, njit(nogil=True, fastmath=flags)(function))
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
