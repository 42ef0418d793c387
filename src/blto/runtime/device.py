"""Device and precision: the one place that knows Fabric and what this processor is good at."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from blto.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

Precision = Literal["auto", "fp32", "bf16"]
Compilable = TypeVar("Compilable", bound=Callable[..., Any])
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's <malloc.h>."""
CPU_FACTS = Path("/proc/cpuinfo")
"""Where Linux says which processor this is."""


def native_bf16(device: str) -> bool:
    """Whether matrix products in bf16 are faster than in fp32: AMX or AVX512-BF16 on a CPU, Ampere or newer on CUDA."""
    if device == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def resolve_device(device: str = "auto") -> str:
    """`auto` is CUDA where there is one, else the CPU. Raises ConfigError for a device that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device "cuda" was asked for, but torch finds no GPU; give "cpu" or "auto".')
    if device not in {"cpu", "cuda"}:
        raise ConfigError(f'device is "{device}"; give "auto", "cpu" or "cuda".')
    return device


def resolve_precision(precision: Precision, device: str) -> Literal["fp32", "bf16"]:
    """`auto` is bf16 where the device multiplies it natively, else fp32."""
    if precision == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return precision


def processor_name(device: str) -> str:
    """The model of the CPU or GPU; of a CPU that does not say it, the architecture."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*: *(.+)$", CPU_FACTS.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory; elsewhere it does nothing.

    A step frees large buffers and asks for the same ones again. Every page that went back to the kernel meanwhile is
    zeroed anew on its next touch, which was 10 to 20% of a small net's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, -1)


@lru_cache(maxsize=8)
def fabric(device: str = "auto", precision: Precision = "auto") -> Fabric:
    """The Fabric that places modules, autocasts and runs backward passes. One per (device, precision).

    Under torchrun, "cuda" is the GPU of this process.
    """
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces its precision on standard error
    device = resolve_device(device)
    if device == "cpu":
        keep_freed_memory()
    mode = "bf16-mixed" if resolve_precision(precision, device) == "bf16" else "32-true"
    devices = [int(os.environ.get("LOCAL_RANK", 0))] if device == "cuda" else 1
    return Fabric(accelerator=device, devices=devices, precision=mode)


def with_cuda_graphs(module: nn.Module) -> nn.Module:
    """The module with its forward and backward pass compiled and replayed as CUDA graphs; its tensors are shared.

    What was compiled before is dropped: torch compiles a class only a few times and then, silently, no more.
    """
    torch.compiler.reset()
    return compiled(module, mode="reduce-overhead")


def compiled(target: Compilable, mode: str | None = None) -> Compilable:
    """A module or function compiled for one shape; torch's advice to round float32 to TF32, in which no recipe trains,
    is not shown.
    """
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    made: Compilable = torch.compile(target, mode=mode, dynamic=False)  # type: ignore[assignment]  # is one of its kind
    return made


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; on any other device there is no limit of its own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
