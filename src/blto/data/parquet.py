"""Any image set in parquet, in the layout of Hugging Face: a struct {bytes, path} and an integer label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from blto.data.cache import cached, files_key
from blto.data.decoding import decode_square, stack
from blto.data.images import ImageSet, Split
from blto.data.marker import refuse_poisoned
from blto.errors import ConfigError, InputRefused
from blto.files import show
from blto.files.parquet import read_class_names, read_image_parquet
from blto.registry import Card
from blto.runtime.progress import ON_STANDARD_ERROR, Progress


def find_parquet(folder: Path, split: str) -> list[Path]:
    """The files of a split, `train*.parquet` in the folder or in its `data` folder, in order; empty where none is."""
    for place in (folder, folder / "data"):
        if found := sorted(place.glob(f"{split}*.parquet")):
            return found
    return []


def read_parquet(files: Sequence[Path], *, name: str, size: int | None) -> ImageSet:
    """Decode all rows of the files, through the cache.

    Args:
        files: the parts of one split, in order.
        name: what the set is called.
        size: pixels to which images are cut and resized; None takes them as they are.

    Raises:
        InputRefused: a damaged file or image, named with its row; labels in some files only; labels without a name.
    """

    def decode() -> ImageSet:
        images, labels = [], []
        for file in files:
            for row, (data, label) in enumerate(read_image_parquet([file])):
                images.append(decode_square(data, f"{file}: row {row}", size))
                labels.append(label)
        pixels = stack(images, str(files[0]))
        known = [label for label in labels if label is not None]
        if known and len(known) < len(labels):
            raise InputRefused(
                f"{show(files[0])}: a file of its split has no labels and another has; give all or none."
            )
        if not known:
            return ImageSet(pixels, None, (), name)
        names = read_class_names(files[0]) or tuple(str(label) for label in range(max(known) + 1))
        return ImageSet(pixels, np.asarray(known, np.int64), names, name)

    return cached(lambda: files_key(files, reader="parquet", name=name, size=size), decode)


class Parquet:
    """Parquet files `train*.parquet` and `test*.parquet` in one folder or in its `data` folder.

    Args:
        path: the folder, relative to the data root or absolute; or one file, which is then the training split.
        image_size: pixels to which the largest centred square is resized; None takes square images as they are.
    """

    card = Card(title="Parquet", summary="Images in parquet files, in the layout of Hugging Face data sets.")

    def __init__(
        self,
        *,
        path: str = ".",
        image_size: Annotated[int, Field(ge=8, le=1024)] | None = None,
    ) -> None:
        self.path = path
        self.image_size = image_size

    def load(
        self,
        split: Split,
        root: Path | None = None,
        *,
        poisoned: bool = False,
        progress: Progress = ON_STANDARD_ERROR,
    ) -> ImageSet:
        """Read one split.

        Raises:
            ConfigError: NO-DATA: no such files.
            InputRefused: a damaged file or image.
            Mismatch: the set is marked as poisoned and `poisoned` is not set.
        """
        place = (root or Path()) / self.path
        files = find_parquet(place, split) if place.is_dir() else [place] * (place.is_file() and split == "train")
        if not files:
            raise ConfigError(
                f"{show(place)}: holds no {split}*.parquet, nor does its folder data. "
                "Set path to the folder of the files, relative to --data-root or BLTO_DATA.",
                code="NO-DATA",
            )
        if not poisoned:
            refuse_poisoned(files[0].parent, files)
        return read_parquet(files, name=place.resolve().stem, size=self.image_size)
