"""The compiled kernels: found beside this file, loaded once, used only where the processor can run them."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

ABI = 5
"""Of `kernels.cpp`: raised there and here when an entry point's arguments or results change."""

ENTRY_POINTS = (
    "blto_pack_images",
    "blto_pack_images_backward",
    "blto_squash_forward",
    "blto_squash_backward",
    "blto_conv_forward",
    "blto_conv_backward",
    "blto_merge_forward",
    "blto_merge_backward",
    "blto_pool_forward",
    "blto_pool_backward",
    "blto_folded_features",
)


def refuse(status: int, *_: object) -> None:
    """Raise MemoryError where an entry point says that its working memory could not be had."""
    if status:
        raise MemoryError("the AMX kernels found no working memory")


@cache
def find_kernels() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and in words which it is, for a log."""
    capabilities = torch.cpu.get_capabilities()
    if not capabilities.get("amx_bf16") or not capabilities.get("avx512_bf16"):
        return None, "plain torch: this processor has no AMX-BF16"
    paths = [Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return (
            None,
            "plain torch: the AMX kernels were not built; install blto where there is a recent C++ compiler",
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"plain torch: the AMX kernels do not load ({error})"
    if getattr(library, "blto_abi", int)() != ABI:
        return None, "plain torch: the AMX kernels are of another version; install blto again"
    if library.blto_request_amx() != 0:
        return None, "plain torch: the system does not grant AMX"
    for name in ENTRY_POINTS:
        getattr(library, name).errcheck = refuse
    return library, "AMX kernels"


def kernels() -> ctypes.CDLL:
    """The library. Raises RuntimeError where there is none: ask `find_kernels` first."""
    library, words = find_kernels()
    if library is None:
        raise RuntimeError(words)
    return library
