"""Features: what an encoder makes of images, extracted once and used by probes, defenses and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blto.errors import ConfigError, Diverged
from blto.models.folded import FoldedEncoder, can_fold
from blto.runtime.device import keep_freed_memory

BATCH, BATCH_ON_CPU = 512, 128  # images; on a CPU the maps of more leave a core's caches


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors of N images, on the CPU.

    Args:
        vectors: float32 (N, D), finite.
        labels: int64 (N,), or None where they are unknown.
        indices: int64 (N,), each vector's row in the image set it was extracted from.

    Raises:
        Diverged: a vector holds NaN or infinity, which a probe would silently turn into some class.
        ConfigError: wrong types or lengths.
    """

    vectors: Tensor
    labels: Tensor | None
    indices: Tensor

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.vectors.dtype != torch.float32:
            raise ConfigError(f"vectors are {self.vectors.dtype} {tuple(self.vectors.shape)}; give float32 (N, D).")
        for name, column in (("labels", self.labels), ("indices", self.indices)):
            if column is not None and (column.dtype != torch.int64 or column.shape != (len(self),)):
                raise ConfigError(f"{name} are {column.dtype} {tuple(column.shape)}; give int64 ({len(self)},).")
        if not is_finite(self.vectors):
            raise Diverged("features hold NaN or infinity; the encoder diverged, pretrain with a lower learning rate.")

    def __len__(self) -> int:
        return len(self.vectors)


def extract(
    encoder: nn.Module,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None = None,
    *,
    indices: npt.NDArray[np.int64] | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    bf16: bool = False,
) -> Features:
    """Run every image once through the encoder in evaluation mode; nothing about the encoder changes.

    In float32 on a CPU our residual nets run with batch norm folded into their convolutions (`FoldedEncoder`), any
    other module as it is. Features differ by rounding, at most 1e-4 of the largest, from those of the plain encoder,
    and by less between batch sizes.

    Args:
        encoder: images (B, 3, H, W) floats in [0, 1] -> (B, D).
        images: uint8 (N, 3, H, W), in memory or memory-mapped.
        labels: int64 (N,), or None.
        indices: rows to take, in this order; None takes all.
        batch_size: images per forward pass, at least 1; None takes what suits the device. The last batch may be
            smaller; no image is left out.
        device: where the encoder lies; None asks its first parameter.
        bf16: run under bfloat16 autocast. The features are float32 all the same.

    Raises:
        ConfigError: images, labels or the encoder's output of another type or shape, or no image.
        Diverged: the features are not finite.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"images are {images.dtype} {images.shape}; give uint8 (N, 3, H, W).")
    if labels is not None and len(labels) != len(images):
        raise ConfigError(f"{len(labels)} labels for {len(images)} images; give one per image, or None.")
    rows = np.arange(len(images)) if indices is None else np.asarray(indices, dtype=np.int64)
    place = torch.device(device) if device is not None else device_of(encoder)
    if not len(rows) or (batch_size is not None and batch_size < 1):
        raise ConfigError(f"{len(rows)} images in batches of {batch_size}; give at least 1 of each.")

    if place.type == "cpu":
        keep_freed_memory()
    batches = []
    with evaluating(encoder), torch.inference_mode(), torch.autocast(place.type, torch.bfloat16, enabled=bf16):
        run, suited = _runner(encoder, place, bf16, images.shape[2:])
        size = suited if batch_size is None else batch_size
        for start in range(0, len(rows), size):
            # Indexing with an array copies, which is what makes a read-only memory map safe to hand to torch.
            batch = torch.from_numpy(images[rows[start : start + size]]).to(place)
            batches.append(run(batch).float().cpu())
    vectors = torch.cat(batches)  # outside inference mode, so an ordinary tensor that gradients may start from
    if vectors.ndim != 2:
        raise ConfigError(f"the encoder yields {tuple(vectors.shape)}; features are (N, D), so pool its output first.")
    known = None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.int64)[rows])
    return Features(vectors, known, torch.from_numpy(rows.copy()))


def _runner(
    encoder: nn.Module, place: torch.device, bf16: bool, image_size: tuple[int, ...]
) -> tuple[Callable[[Tensor], Tensor], int]:
    """The encoder as a function of uint8 images, and the batch size that suits it."""
    if place.type == "cpu" and can_fold(encoder) and not bf16:
        folded = FoldedEncoder(encoder, image_size=(image_size[0], image_size[1]))
        return folded, folded.batch_size
    suited = BATCH_ON_CPU if place.type == "cpu" else BATCH
    return lambda images: cast(Tensor, encoder(images.float().div_(255))), suited


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is back in the mode it was in, also after an error."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer lies; the CPU for a module that has none."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinity; one pass, without a mask of the tensor's size. True for an empty one."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())  # NaN is passed on
