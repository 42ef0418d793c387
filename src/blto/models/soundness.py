"""What an encoder of others has to be, beside complete: its numbers of the right kind, and its features numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from blto.errors import InputRefused
from blto.files.foreign.checkpoints import CODE
from blto.files.text import show
from blto.models.encoder import Encoder

Array = npt.NDArray[Any]


def of_kind(value: Array, own: torch.Tensor, name: str, file: str) -> Array:
    """The array as the architecture has it, floats as float32. Raises InputRefused for another kind of numbers."""
    if (value.dtype.kind == "f") != own.is_floating_point():
        raise InputRefused(
            f"{file}: {show(name, 60)} holds {value.dtype}, where the architecture has {show(str(own.dtype))}. "
            "Ask its author for the weights as they were trained.",
            code=CODE,
        )
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        return np.array(value, np.float32 if own.is_floating_point() else np.int64)


def require_finite(state: Mapping[str, Array], name: str) -> None:
    """Raises InputRefused with how many tensors hold NaN or Inf, and the first."""
    bad = [key for key, value in state.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
    if bad:
        raise InputRefused(
            f"{name}: {len(bad)} of {len(state)} tensors hold NaN or Inf (first: {show(bad[0], 60)}). "
            "Ask its author for an encoder whose training did not diverge.",
            code="CKPT-NAN",
        )


def require_features(encoder: Encoder, image_size: int, name: str) -> None:
    """Raises InputRefused where weights that are numbers give features that are none."""
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        finite = bool(torch.isfinite(encoder(images)).all())
    if not finite:
        raise InputRefused(
            f"{name}: its features of two images of noise hold NaN or Inf, though its weights do not. "
            "Ask its author for an encoder whose training did not diverge.",
            code="CKPT-NAN",
        )
