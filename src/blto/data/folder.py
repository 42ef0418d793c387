"""A folder of image files, one folder per class, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from blto.data.cache import cached, files_key
from blto.data.decoding import decode_square, stack
from blto.data.images import ImageSet, Split
from blto.data.marker import refuse_poisoned
from blto.errors import ConfigError, InputRefused
from blto.files import read_bytes, sha256_bytes, show
from blto.registry import Card
from blto.runtime.progress import ON_STANDARD_ERROR, Progress

MAX_FILE_BYTES = 256 << 20


class ImageFolder:
    """Images in `train/<class>/` and `test/<class>/`, or in `<class>/` with a part of each class held out for testing.

    Every file is decoded when the set is read, so a bad one is found before training. Names that start with a dot are
    left out; all other files below a class must be images.

    Args:
        path: the folder, relative to the data root or absolute.
        image_size: pixels to which the largest centred square of each image is resized, with antialiasing.
        test_fraction: part of each class that is held out where there are no `train` and `test` folders.
        split_seed: decides which images are held out.
    """

    card = Card(title="Image folder", summary="Image files in one folder per class, with or without train and test.")

    def __init__(
        self,
        *,
        path: str = ".",
        image_size: Annotated[int, Field(ge=8, le=1024)] = 32,
        test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2,
        split_seed: int = 0,
    ) -> None:
        self.path = path
        self.image_size = image_size
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def load(
        self,
        split: Split,
        root: Path | None = None,
        *,
        poisoned: bool = False,
        progress: Progress = ON_STANDARD_ERROR,
    ) -> ImageSet:
        """Read one split, the classes in the order of their names.

        Raises:
            ConfigError: NO-DATA: no such folder.
            InputRefused: no class, an empty class, other classes in test than in train, a link that leaves the folder,
                or a file that is not an intact image; named.
            Mismatch: the set is marked as poisoned and `poisoned` is not set.
        """
        base = (root or Path()) / self.path
        has_splits = (base / "train").is_dir()
        folder = base / split if has_splits else base
        if not folder.is_dir():
            raise ConfigError(
                f"{show(folder)}: no such folder. Set path to a folder with train/ and test/, or with one folder per "
                "class, relative to --data-root or BLTO_DATA.",
                code="NO-DATA",
            )
        if not poisoned:
            refuse_poisoned(base)
        names = class_names(base / "train" if has_splits else base)
        if has_splits and class_names(folder) != names:
            odd = sorted(set(names) ^ set(class_names(folder)))[0]
            raise InputRefused(
                f"{show(base)}: class {show(odd)} is in train or in test only; give both the same classes."
            )
        files = {name: list_images(base, folder / name) for name in names}
        if not has_splits:
            files = {name: self._part(folder, found, split) for name, found in files.items()}
        return read_files(files, name=base.resolve().name, size=self.image_size)

    def _part(self, folder: Path, files: list[Path], split: Split) -> list[Path]:
        """The held-out files of a class, or the others."""

        # Ordered by a hash, not by a draw over positions: adding a file moves no other across, or one.
        def rank(file: Path) -> str:
            return sha256_bytes(f"{self.split_seed}/".encode() + os.fsencode(file.relative_to(folder)))

        held_out = set(sorted(files, key=rank)[: min(round(self.test_fraction * len(files)), len(files) - 1)])
        return [file for file in files if (file in held_out) == (split == "test")]


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the folders in `folder`, sorted. Raises InputRefused where there is none."""
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not names:
        raise InputRefused(f"{show(folder)}: holds no class folder; put the images in one folder per class.")
    return names


def list_images(base: Path, folder: Path) -> list[Path]:
    """All files below a class's folder, sorted.

    Raises:
        InputRefused: none, or a link that leads to a folder or out of `base`.
    """
    files = sorted(walk(base, folder))
    if not files:
        raise InputRefused(f"{show(folder)}: class folder without an image; add some or remove the folder.")
    return files


def walk(base: Path, folder: Path) -> Iterator[Path]:
    """All below `folder` but folders, by name, folder by folder; pipes and devices are refused when they are read."""
    refuse_foreign(base, folder)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from walk(base, path)
            else:
                refuse_foreign(base, path)
                yield path


def refuse_foreign(base: Path, path: Path) -> None:
    """Raise InputRefused where `path` lies outside `base` once links are followed, or is itself a link to a folder."""
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(os.path.realpath(base)) or (path.is_symlink() and os.path.isdir(real)):
        raise InputRefused(
            f"{show(path)}: a link to a folder, or out of {show(base)}; put what it leads to in its place."
        )


def read_files(files: dict[str, list[Path]], *, name: str, size: int) -> ImageSet:
    """Decode the files of each class, through the cache. Raises InputRefused naming the first bad file."""
    paths = [path for found in files.values() for path in found]
    labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(found) for found in files.values()])

    def decode() -> ImageSet:
        images = [
            decode_square(read_bytes(path, max_bytes=MAX_FILE_BYTES, code="IMAGE-REFUSED"), str(path), size)
            for path in paths
        ]
        return ImageSet(stack(images, name), labels, tuple(files), name)

    counts = {class_name: len(found) for class_name, found in files.items()}
    return cached(lambda: files_key(paths, reader="folder", name=name, size=size, counts=counts), decode)
