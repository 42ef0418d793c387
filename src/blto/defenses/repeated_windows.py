"""Repeated windows: which images share an exact piece of texture with many others?"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from blto.defenses.base import Conditions, DatasetFilter, Images, Scores
from blto.defenses.evidence import Evidence
from blto.errors import InputRefused
from blto.models.encoder import Encoder
from blto.registry import Card
from blto.runtime.seeds import numpy_generator

Hashes = npt.NDArray[np.uint64]
Table = tuple[Hashes, npt.NDArray[np.int64]]
"""Hashes, ascending, and in how many images each occurs."""

MOST_WINDOWS = 1024
"""Of one image: where there are more, those with the smallest hashes, which is the same choice in every image."""
MOST_ENTRIES = 2**18
BATCH = 128
_ACROSS, _DOWN = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def window_hashes(images: npt.NDArray[np.uint8], size: int, texture: int) -> Hashes:
    """A hash for every window of `size` pixels a side: uint8 (B, H, W, 3) -> (B, windows); 0 for one that is left out.

    A window counts where at least `texture` pairs of neighbours in it differ along the rows, and as many along the
    columns: without that, every plain sky would be like every other.
    """
    height, width = images.shape[1] - size + 1, images.shape[2] - size + 1
    if height < 1 or width < 1:
        return np.zeros((len(images), 0), np.uint64)
    red, green, blue = (images[..., channel].astype(np.uint64) for channel in range(3))
    colors = red << np.uint64(16) | green << np.uint64(8) | blue
    across = _polynomial(_mixed(colors + np.uint64(1)), size, 2, _ACROSS)
    hashes = _mixed(_polynomial(across, size, 1, _DOWN)).reshape(len(images), -1)
    changes = [
        _sums(_sums(colors[:, :, 1:] != colors[:, :, :-1], size - 1, 2), size, 1),
        _sums(_sums(colors[:, 1:] != colors[:, :-1], size - 1, 1), size, 2),
    ]
    kept = np.minimum(*changes).reshape(len(images), -1) >= texture
    if height * width > MOST_WINDOWS:
        kept &= hashes < np.uint64(2**64 * MOST_WINDOWS // (height * width))
    return np.where(kept, hashes, np.uint64(0))


def count_images(batches: Iterable[Hashes]) -> Table:
    """In how many images each hash occurs, over batches (B, windows); those that occur in one alone are left out.

    Of more than 262,144 the most frequent are kept, of equal ones the smallest: the order of the images is no matter.
    """
    found = [_once(hashes) for hashes in batches]
    sorted_hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *found]))
    begins = np.flatnonzero(np.concatenate([[True], sorted_hashes[1:] != sorted_hashes[:-1]])[: len(sorted_hashes)])
    counts = np.diff(begins, append=len(sorted_hashes))
    several = counts > 1
    hashes, counts = sorted_hashes[begins[several]], counts[several]
    best = np.sort(np.argsort(-counts, kind="stable")[:MOST_ENTRIES])
    return hashes[best], counts[best]


def sharing(hashes: Hashes, table: Table, counted: npt.NDArray[np.bool_]) -> Scores:
    """For each image the largest number of others that share one of its windows; one other alone is taken for none.

    Args:
        hashes: (B, windows).
        table: of `count_images`.
        counted: (B,), whether the image is itself among those that were counted.
    """
    known, counts = table
    if not len(known) or not hashes.shape[1]:
        return np.zeros(len(hashes))
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    most = np.where(known[places] == hashes, counts[places], 0).max(axis=1) - counted
    return np.where(most > 1, most, 0).astype(np.float64)


class RepeatedWindows(DatasetFilter):
    """Count in how many images each small window of pixels occurs exactly; an image scores its most frequent one.

    No paper: it is made for opaque patches that are pasted without change, as SSL-Backdoor's (arXiv 2105.10123) and
    BadNets'. A pasted patch is the same pixels in every image that has it, while photographs hardly ever share a
    textured window. Windows are hashed and counted in `sample` images, drawn from the seed; every image is then looked
    up, and the score is the number of sampled images, without itself, that share one of its windows.

    It sees nothing of a patch that was resized, blended or stored as JPEG after it was pasted, nor of a trigger that
    depends on the image. A logo or a watermark that many clean images carry is found as well.

    Args:
        window: side of a window in pixels; smaller than the patch.
        texture: how many pairs of neighbours in a window have to differ, along the rows and along the columns; of a
            window with one edge that crosses it, `window` do.
        sample: images in which windows are counted; all where there are fewer. A poison is found where two others of
            its kind are among them.
    """

    card = Card(
        "Repeated windows",
        "whether an image shares exact pixels with many others",
        threat_model="the training set without labels",
    )
    evidence = Evidence(
        "It finds every pasted patch of 5 to 12 pixels at 1% of CIFAR-10 and nothing else, on two of two draws; at "
        "0.1% it is as good as the images that the set itself holds many times; it sees neither CTRL nor BLTO.",
        must_show="test_repeated_windows::test_pasted_patches_are_found",
        positive="test_repeated_windows::test_patches_of_other_sizes_are_found",
    )
    needs_encoder = False

    def __init__(
        self,
        *,
        window: Annotated[int, Field(ge=2, le=64)] = 5,
        texture: Annotated[int, Field(ge=0)] = 5,
        sample: Annotated[int, Field(ge=3, le=2**17)] = 8192,
    ) -> None:
        self.window, self.texture, self.sample = window, texture, sample

    def hashes(self, images: npt.NDArray[np.uint8]) -> Hashes:
        """`window_hashes` of images (B, H, W, 3) with these options."""
        return window_hashes(images, self.window, self.texture)

    def score(self, suspects: Images, encoder: Encoder | None, conditions: Conditions) -> Scores:
        """See `DatasetFilter.score`. Raises InputRefused for fewer than 3 images."""
        count = len(suspects)
        if count < 3:
            raise InputRefused(f"{count} images, and windows are compared between images; give 3 or more.")
        draw = numpy_generator(conditions.seed, "defense", "repeated_windows")
        sampled = np.sort(draw.choice(count, min(count, self.sample), replace=False))
        counted = np.isin(np.arange(count), sampled)
        table = count_images(
            self._hashes(suspects[part]) for part in np.array_split(sampled, -(-len(sampled) // BATCH))
        )
        scores = np.empty(count)
        with conditions.progress.bar("repeated windows", count) as advance:
            for begin in range(0, count, BATCH):
                part = slice(begin, begin + BATCH)
                scores[part] = sharing(self._hashes(suspects[part]), table, counted[part])
                advance(min(part.stop, count), "")
        return scores

    def _hashes(self, images: Images) -> Hashes:
        return self.hashes(images.transpose(0, 2, 3, 1))


def _polynomial(values: Hashes, size: int, axis: int, base: int) -> Hashes:
    """At each place the polynomial, modulo 2^64, whose coefficients are the `size` values from there on."""
    return reduce(lambda total, here: total * np.uint64(base) + here, _shifted(values, size, axis))


def _sums(values: npt.NDArray[Any], size: int, axis: int) -> npt.NDArray[np.int16]:
    """At each place the sum of the `size` values from there on; 0 for none."""
    return np.sum(_shifted(values, size, axis), axis=0, dtype=np.int16)  # type: ignore[no-any-return]


def _shifted(values: npt.NDArray[Any], size: int, axis: int) -> list[npt.NDArray[Any]]:
    length = values.shape[axis] - size + 1
    before: tuple[slice, ...] = (slice(None),) * axis
    return [values[(*before, slice(begin, begin + length))] for begin in range(size)]


def _mixed(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64: every bit of the result depends on every bit of the value."""
    for shift, factor in _MIX:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def _once(hashes: Hashes) -> Hashes:
    """Each image's hashes once, without 0, all images in a row."""
    ordered = np.sort(hashes, axis=1)
    new = np.ones(ordered.shape, np.bool_)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return np.asarray(ordered[new & (ordered != 0)])
