"""LARS (You et al., arXiv 1708.03888) without reading a norm on the host, which would stop a GPU at every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

TRUST = 0.001
EPSILON = 1e-8


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled, layer by layer, to the norm of the weights.

    The formula and its constants are lightly's, against which it is tested: with weights w and gradient g, the step is
    TRUST |w| / (|g| + decay |w| + EPSILON) (g + decay w), and g itself where a norm is zero.

    Args:
        groups: of parameters; in those with `"adapt": False` (biases, norms) the step is g: no decay, no scaling.
        lr: learning rate, applied after the momentum.
        momentum: of the running sum of steps.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure is used
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                step = self._scaled(weights, group["weight_decay"]) if group["adapt"] else weights.grad
                state = self.state[weights]
                if "momentum_buffer" in state:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(step)
                else:
                    state["momentum_buffer"] = step.clone()
                weights.add_(state["momentum_buffer"], alpha=-group["lr"])

    @staticmethod
    def _scaled(weights: torch.Tensor, decay: float) -> torch.Tensor:
        gradient = weights.grad
        assert gradient is not None
        size, slope = weights.norm(), gradient.norm()
        scale = TRUST * (size / (slope + size * decay + EPSILON))
        return torch.where((size > 0) & (slope > 0), gradient.add(weights, alpha=decay) * scale, gradient)
