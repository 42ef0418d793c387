"""Several processes that train one net: which of them this is, its share of a batch, and what they tell each other.

torchrun starts them, one for each GPU, and the script joins them by `torch.distributed.init_process_group()`. Without a
process group everything here means one process and does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightly.utils.dist import gather as gather_with_gradient
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from blto.errors import ConfigError


def process_count() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def require_one_process(what: str) -> None:
    """Raise ConfigError in a process group: `what` (as a sentence begins) is not written for several processes."""
    if process_count() > 1:
        raise ConfigError(f"{what} runs in one process, but {process_count()} were started; start it without torchrun.")


def share(rows: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """This process's part of a batch that the number of processes divides."""
    size = len(rows) // process_count()
    start = process_number() * size
    return rows[start : start + size]


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, (B, d) -> (B * processes, d), in the processes' order.

    Differentiable: a row's gradient is the sum of what it has in all processes.
    """
    return torch.cat(gather_with_gradient(rows)) if process_count() > 1 else rows


def mean_of_all(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over the processes of each scalar, in every process; a NaN in one is a NaN in all."""
    if process_count() == 1:
        return dict(values)
    means = torch.stack(list(values.values()))
    dist.all_reduce(means)
    return dict(zip(values, means / process_count(), strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether it is set in some process. All must ask; with several it reads from `device`, and so waits for it."""
    if process_count() == 1:
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def joined(module: nn.Module) -> nn.Module:
    """The module, on its device, such that a backward pass gives every process the mean of all processes' gradients.

    Raises:
        ConfigError: batch norm on a CPU, where torch has no batch norm that sees the whole batch.
    """
    if process_count() == 1:
        return module
    if next(module.parameters()).device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # torch's
    elif any(isinstance(part, _BatchNorm) for part in module.modules()):
        raise ConfigError(
            f"the net has batch norm, which {process_count()} processes on the CPU would each compute from a part of "
            "the batch; train in one process or on GPUs, or take a net and heads without batch norm."
        )
    return DistributedDataParallel(module, broadcast_buffers=False)
