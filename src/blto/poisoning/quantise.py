"""The one rounding to 8 bits that poisons and test triggers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blto.errors import ConfigError, Diverged
from blto.poisoning.trigger import Trigger


def quantise(images: Tensor) -> Tensor:
    """Float images in [0, 1] -> uint8, round half to even; values outside [0, 1] are clipped.

    Raises:
        Diverged: a value is NaN or infinite.
    """
    if not torch.isfinite(images).all():
        raise Diverged("trigger: its output holds NaN or Inf; lower the learning rate and craft it again.")
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def apply_to_uint8(trigger: Trigger, images: npt.NDArray[np.uint8], *, batch_size: int = 256) -> npt.NDArray[np.uint8]:
    """Trigger 8-bit images, on the device that holds the trigger's weights.

    The trigger runs in eval mode without gradients and is left in the mode it was in. Where epsilon is not a whole
    number of 8-bit steps, rounding could step over it, so the result is clipped once more in integers: each value stays
    within `trigger.budget.levels` of the given one.

    Args:
        trigger: what to apply.
        images: uint8 (N, 3, H, W), not written to.
        batch_size: images per forward pass.

    Returns:
        uint8 (N, 3, H, W), a new array.

    Raises:
        ConfigError: images of another type or shape, or a batch size below 1.
        Diverged: the trigger yields NaN or Inf.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"trigger: images are {images.dtype} {images.shape}; accepted are uint8 (N, 3, H, W).")
    if batch_size < 1:
        raise ConfigError(f"trigger: batch_size is {batch_size}; give 1 or more.")
    weights = next(chain(trigger.parameters(), trigger.buffers()), None)
    device = torch.device("cpu") if weights is None else weights.device
    triggered = np.empty_like(images)
    with _evaluating(trigger), torch.inference_mode():
        for start in range(0, len(images), batch_size):
            given = np.array(images[start : start + batch_size])
            output = trigger(torch.from_numpy(given).to(device).float() / 255)
            rounded = quantise(output).cpu().numpy().astype(np.int16)
            low, high = given.astype(np.int16) - trigger.budget.levels, given.astype(np.int16) + trigger.budget.levels
            triggered[start : start + batch_size] = np.clip(rounded, low, high)
    return triggered


@contextmanager
def _evaluating(trigger: Trigger) -> Iterator[None]:
    # Module by module: `trigger.train(True)` afterwards would also wake up a frozen batch norm inside it.
    modes = [(module, module.training) for module in trigger.modules()]
    trigger.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
