"""One optimisation step, and what it needs: the method on its device, the optimiser, the learning-rate schedule.

The victim's loop and BLTO's inner problem both call `Trainer.train_step`; there is no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from blto.models import BACKBONES
from blto.models.encoder import Encoder
from blto.models.native import resnet
from blto.models.native.library import find_kernels
from blto.pretraining import METHODS
from blto.pretraining.lars import LARS
from blto.pretraining.method import SSLMethod
from blto.pretraining.mixing import cutmix
from blto.pretraining.spec import Engine, OptimizerSpec, RecipeSpec
from blto.runtime.device import (
    Precision,
    fabric,
    processor_name,
    resolve_device,
    resolve_precision,
    with_cuda_graphs,
)
from blto.runtime.distributed import joined, mean_of_all, process_count

GRAPHS = "torch.compile with CUDA graphs"


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then half a cosine to zero (arXiv 1608.03983)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * share))


def build_optimizer(spec: OptimizerSpec, method: SSLMethod) -> torch.optim.Optimizer:
    """The optimiser over the method's trainable parameters; one-dimensional ones (biases, norms) are not decayed."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr)
    if spec.name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=spec.lr, momentum=spec.momentum)
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)


def training_precision(precision: Precision, engine: Engine, device: str) -> Literal["fp32", "bf16"]:
    """The precision that a recipe's `precision` and `engine` mean on "cpu" or "cuda"."""
    return "fp32" if precision == "auto" and engine == "reference" else resolve_precision(precision, device)


def uses_cuda_graphs(engine: Engine, device: str) -> bool:
    """Whether a pretraining on "cpu" or "cuda" does: several processes talk to each other inside a pass."""
    return engine == "fast" and device == "cuda" and process_count() == 1


def arithmetic(spec: RecipeSpec, device: str, image_size: int, *, cuda_graphs: bool = True) -> dict[str, str]:
    """What of a recipe's result depends on the machine: device, its model, the resolved precision, and the engine.

    `cuda_graphs` is what the `Trainer` was given: a surrogate is trained without them.
    """
    device = resolve_device(device)
    precision = training_precision(spec.precision, spec.engine, device)
    engine = GRAPHS if cuda_graphs and uses_cuda_graphs(spec.engine, device) else "plain torch"
    if spec.engine == "fast" and device == "cpu" and (precision == "bf16" or spec.precision == "auto"):
        kernels, engine = find_kernels()
        views = METHODS.get(spec.method["name"]).views_per_pass  # type: ignore[attr-defined]  # of the class
        batch = torch.empty(views * spec.batch_size, 3, image_size, image_size)
        with torch.random.fork_rng(devices=[]):
            backbone = BACKBONES.build(spec.backbone)
        if kernels is not None and not resnet.supports(backbone, batch):
            engine = "plain torch: the AMX kernels do not fit this backbone, batch or image size"
    return {
        "device": device,
        "processor": processor_name(device),
        "precision": precision,
        "engine": engine,
    }


@contextmanager
def plain(encoder: Encoder) -> Iterator[None]:
    """The encoder as others will meet it: without the native kernels, whose activations are bf16."""
    native, encoder.native = encoder.native, False
    try:
        yield
    finally:
        encoder.native = native


class Trainer:
    """A method in training.

    Args:
        method: encoder and heads; moved to the device, the encoder in the memory format that suits its engine.
        optimizer: optimiser and peak learning rate.
        total_steps, warmup_steps: length of the schedule.
        seed: of what a step draws itself, which is i-CutMix's box.
        device, precision: as in `runtime.device`.
        engine: "fast" trains through the native kernels where they fit (a residual net, bf16, a CPU with AMX); every
            other step, and every step of "reference", is plain torch.
        cuda_graphs: compile the passes and replay them as CUDA graphs, where the engine is fast, the device a GPU and
            this the only process. Each net is compiled anew, so it is for one that is trained for long.

    In a process group a step's views are this process's part of the batch, and weights and losses are the same in all.

    Raises:
        ConfigError: a net with batch norm in several processes on the CPU.

    Attributes:
        precision: in which it trains, "fp32" or "bf16".
        arithmetic: precision, engine and number of processes in words: what rounding depends on.
        step: optimiser steps done.
        first_bad_step: on the device, the first step (from 0) whose loss was NaN or Inf, or -1. Reading it
            synchronises, so the loop does that now and then only.
    """

    def __init__(
        self,
        method: SSLMethod,
        *,
        optimizer: OptimizerSpec,
        total_steps: int,
        warmup_steps: int = 0,
        seed: int = 0,
        device: str = "auto",
        precision: Precision = "auto",
        engine: Engine = "fast",
        cuda_graphs: bool = False,
    ) -> None:
        device = resolve_device(device)
        self.precision = training_precision(precision, engine, device)
        native = engine == "fast" and self.precision == "bf16" and device == "cpu"
        cuda_graphs = cuda_graphs and uses_cuda_graphs(engine, device)
        self.fabric = fabric(device, self.precision)
        own = native and resnet.fits(method.encoder.backbone)  # the kernels take weights as they are by default
        method.encoder.to(memory_format=torch.contiguous_format if own else torch.channels_last)
        for part in method.modules():
            if isinstance(part, Encoder):
                part.native = native
        self.method = method.to(self.fabric.device).train()
        wrapped = with_cuda_graphs(method) if cuda_graphs else joined(method)
        self._wrapped, self.optimizer = self.fabric.setup(wrapped, build_optimizer(optimizer, method))
        words = find_kernels()[1] if native else GRAPHS if cuda_graphs else "plain torch"
        processes = f", {process_count()} processes" if process_count() > 1 else ""
        self.arithmetic = f"{self.precision}, {words}{processes}"
        self._peak, self._seed = optimizer.lr, seed
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.step = 0
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=self.fabric.device)

    def train_step(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """One step on `views`, each (B, 3, H, W) in [0, 1]. Returns the method's losses, detached, on the device."""
        factor = learning_rate_factor(self.step, total_steps=self.total_steps, warmup_steps=self.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self._peak * factor
        if not self.method.training:  # else a walk through all modules in every step
            self.method.train()
        losses: dict[str, Tensor] = self._mixed(views) if self.method.i_cutmix else self._wrapped(views)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(losses["loss"])
        self.optimizer.step()
        self.step += 1
        self.method.after_step(min(1.0, self.step / self.total_steps))
        detached = mean_of_all({name: value.detach().clone() for name, value in losses.items()})  # a replay reuses them
        is_first_bad = (self.first_bad_step < 0) & ~torch.isfinite(detached["loss"])
        self.first_bad_step = torch.where(is_first_bad, self.step - 1, self.first_bad_step)
        return detached

    def _mixed(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """The losses with the first view mixed."""
        mixed, share = cutmix(views[0], self.method.i_cutmix, seed=self._seed, step=self.step)
        losses: dict[str, Tensor] = self._wrapped([mixed, *views[1:]], share)
        return losses
