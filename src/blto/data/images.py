"""`ImageSet`: the one shape in which every data set reaches the rest of the program."""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from blto.errors import ConfigError, InputRefused

Split = Literal["train", "test"]

HOLD_OUT_SEED = 12345


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with, where they are known, their labels.

    Args:
        images: uint8 (N, 3, H, W), square and C-contiguous; in memory or memory-mapped, never written to.
        labels: int64 (N,), each in [0, number of class names); None where a victim must not see them.
        class_names: one name per class.
        name: what the set is called in records and messages.

    Raises:
        InputRefused: pixels or labels of another type, shape or range.
        ConfigError: labels without class names.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise InputRefused(
                f"{self.name}: images are {images.dtype} {images.shape}; accepted are uint8 (N, 3, H, W), square RGB."
            )
        if not images.flags.c_contiguous:
            raise InputRefused(f"{self.name}: images are not C-contiguous; pass np.ascontiguousarray(images).")
        if labels is None:
            return
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise InputRefused(
                f"{self.name}: labels are {labels.dtype} {labels.shape}; accepted are int64 ({len(images)},)."
            )
        if not self.class_names:
            raise ConfigError(f"{self.name}: labels were given without class names; pass class_names.")
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise InputRefused(
                f"{self.name}: labels span [{labels.min()}, {labels.max()}]; "
                f"accepted are 0 to {self.num_classes - 1}, one per class name."
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return int(self.images.shape[2])

    @property
    def num_classes(self) -> int:
        """Number of class names, which may exceed the number of classes present in a subset."""
        return len(self.class_names)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) over shape, pixels and labels; neither the name nor the class names matter."""
        digest = hashlib.sha256(repr((self.images.shape, self.labels is not None)).encode())
        digest.update(self.images.data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        return digest.hexdigest()

    def subset(self, indices: npt.NDArray[np.int64]) -> ImageSet:
        """The images at `indices` int64 (K,), in that order, copied. Raises IndexError where one is out of range."""
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=self.images[indices], labels=labels)

    def without_labels(self) -> ImageSet:
        """The same images as a victim sees them: unlabeled and without class names."""
        return dataclasses.replace(self, labels=None, class_names=())

    def replace(self, indices: npt.NDArray[np.int64], images: npt.NDArray[np.uint8]) -> ImageSet:
        """A copy in which `images` uint8 (K, 3, H, W) stand at the distinct `indices` int64 (K,); labels are kept."""
        if images.dtype != np.uint8 or images.shape != (len(indices), *self.images.shape[1:]):
            raise ConfigError(
                f"{self.name}: replacements are {images.dtype} {images.shape}; "
                f"accepted are uint8 {(len(indices), *self.images.shape[1:])}, one per index."
            )
        if len(np.unique(indices)) != len(indices):
            raise ConfigError(f"{self.name}: an index is named twice among the images to replace; name each once.")
        pixels = np.array(self.images)
        pixels[indices] = images
        return dataclasses.replace(self, images=pixels)


def hold_out(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """Training images to train on, and `count` others to choose recipes by: the same ones for every seed and caller.

    Raises:
        ConfigError: there are too few images to leave one to train on.
    """
    if count >= len(images):
        raise ConfigError(f"held_out is {count}; {images.name} has {len(images)} training images, give fewer of them.")
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(images))
    return images.subset(np.sort(order[count:])), images.subset(np.sort(order[:count]))


@contextmanager
def random_access(array: npt.NDArray[Any]) -> Iterator[None]:
    """Tell the system that rows of `array` are read in random order while the block runs, where it is memory-mapped.

    Else every row of a set larger than memory costs a read-ahead, which is megabytes on some machines.
    """
    owner: object = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = getattr(owner, "base", None)
    if owner is None or not hasattr(mmap, "MADV_RANDOM"):
        yield
        return
    owner.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        owner.madvise(mmap.MADV_NORMAL)
