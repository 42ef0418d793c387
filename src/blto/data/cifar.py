"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): found in any of their usual forms, else downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from blto.data.cache import cache_folder, cached, files_key
from blto.data.images import ImageSet, Split
from blto.data.marker import refuse_poisoned
from blto.data.parquet import find_parquet, read_parquet
from blto.errors import ConfigError, InputRefused, ResourceExhausted
from blto.files import show
from blto.files.download import download
from blto.files.foreign.cifar_batches import read_cifar
from blto.registry import Card
from blto.runtime.progress import ON_STANDARD_ERROR, Progress
from blto.runtime.seeds import numpy_generator

Kind = Literal["cifar10", "cifar100"]
Limit = Annotated[int, Field(ge=1)] | None

MEBIBYTE = 1 << 20


class Public(NamedTuple):
    """The public archive of a set: its folder when unpacked, its own name, size in bytes and SHA-256."""

    classes: int
    folder: str
    archive: str
    size: int
    sha256: str

    @property
    def url(self) -> str:
        """Where it is published."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


PUBLIC: dict[Kind, Public] = {
    "cifar10": Public(
        classes=10,
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        size=170_498_071,
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    "cifar100": Public(
        classes=100,
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        size=169_001_437,
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ),
}


class Cifar10:
    """CIFAR-10: 50,000 training and 10,000 test images, 32x32, ten classes.

    Args:
        train_limit: number of training images, the classes in their proportions; None takes all.
        test_limit: the same for the test images.
        limit_seed: decides which images a limit keeps.
    """

    card = Card(
        title="CIFAR-10",
        summary="Ten classes of 32x32 photographs; parquet, Python batches or archive, else downloaded.",
        paper="Krizhevsky, Learning Multiple Layers of Features from Tiny Images",
        year=2009,
    )

    def __init__(self, *, train_limit: Limit = None, test_limit: Limit = None, limit_seed: int = 0) -> None:
        self.limits = {"train": train_limit, "test": test_limit}
        self.limit_seed = limit_seed

    def load(
        self,
        split: Split,
        root: Path | None = None,
        *,
        poisoned: bool = False,
        progress: Progress = ON_STANDARD_ERROR,
    ) -> ImageSet:
        """Read one split; errors as `load_cifar`, and ConfigError where a limit exceeds it."""
        images = load_cifar("cifar10", split, root, poisoned=poisoned, progress=progress)
        return limited(images, self.limits[split], self.limit_seed)


class Cifar100:
    """CIFAR-100 with its fine labels: 50,000 training and 10,000 test images, 32x32, a hundred classes.

    Args:
        train_limit: number of training images, the classes in their proportions; None takes all.
        test_limit: the same for the test images.
        limit_seed: decides which images a limit keeps.
    """

    card = Card(
        title="CIFAR-100",
        summary="A hundred classes of 32x32 photographs; parquet, Python batches or archive, else downloaded.",
        paper="Krizhevsky, Learning Multiple Layers of Features from Tiny Images",
        year=2009,
    )

    def __init__(self, *, train_limit: Limit = None, test_limit: Limit = None, limit_seed: int = 0) -> None:
        self.limits = {"train": train_limit, "test": test_limit}
        self.limit_seed = limit_seed

    def load(
        self,
        split: Split,
        root: Path | None = None,
        *,
        poisoned: bool = False,
        progress: Progress = ON_STANDARD_ERROR,
    ) -> ImageSet:
        """Read one split; errors as `load_cifar`, and ConfigError where a limit exceeds it."""
        images = load_cifar("cifar100", split, root, poisoned=poisoned, progress=progress)
        return limited(images, self.limits[split], self.limit_seed)


def load_cifar(
    kind: Kind,
    split: Split,
    root: Path | None,
    *,
    poisoned: bool = False,
    progress: Progress = ON_STANDARD_ERROR,
) -> ImageSet:
    """Read one split from `root`, `root/<kind>`, an earlier download, or the public archive, through the cache.

    Raises:
        ConfigError: NO-DATA: neither found nor to be downloaded.
        InputRefused: damaged, or another set under CIFAR's name.
        Mismatch: marked as poisoned and `poisoned` is not set.
    """
    places = [] if root is None else [root / kind, root]
    for place in places:
        if files := find_parquet(place, split):
            if not poisoned:
                refuse_poisoned(files[0].parent, files)
            return checked(read_parquet(files, name=kind, size=None), kind, files[0])
    source = find_batches(kind, [*places, cache_folder() / "downloads"]) or fetch(kind, root, progress)

    def decode() -> ImageSet:
        return ImageSet(*read_cifar(source, kind, split), kind)

    files = sorted(entry for entry in source.iterdir() if entry.is_file()) if source.is_dir() else [source]
    images = cached(lambda: files_key(files, reader="batches", name=kind, split=split), decode)
    return checked(images, kind, source)


def find_batches(kind: Kind, places: list[Path]) -> Path | None:
    """The unpacked folder or the archive in one of the places, or a place that is itself the folder."""
    public = PUBLIC[kind]
    for place in places:
        if place.name == public.folder and os.path.isdir(place):
            return place
        for candidate in (place / public.folder, place / public.archive):
            if os.path.exists(candidate):  # false, not an error, in a folder that may not be searched
                return candidate
    return None


def fetch(kind: Kind, root: Path | None, progress: Progress) -> Path:
    """Download the public archive into the cache. Raises ConfigError (NO-DATA) and, for other bytes, InputRefused."""
    public = PUBLIC[kind]
    target = cache_folder() / "downloads" / public.archive
    progress.say(f"{kind}: downloading {public.url} to {show(target)}")
    try:
        with progress.bar(f"{kind}, MiB", public.size // MEBIBYTE) as advance:
            download(
                public.url,
                target,
                sha256=public.sha256,
                progress=lambda done, total: advance(done // MEBIBYTE, ""),
                max_bytes=public.size,
            )
    except (ConfigError, ResourceExhausted) as error:
        where = f"not in {show(root, 60)}" if root else "no data root is set"
        cause = error.__cause__ or error
        raise ConfigError(
            f"{kind}: {where}, and no download ({show(getattr(cause, 'reason', None) or cause, 40)}). Name the folder "
            f"that holds {kind}/train*.parquet, {public.folder}/ or {public.archive} with --data-root or BLTO_DATA.",
            code="NO-DATA",
        ) from error
    return target


def checked(images: ImageSet, kind: Kind, source: Path) -> ImageSet:
    """The set itself. Raises InputRefused where it has no labels, or other classes or sizes than `kind`."""
    classes = PUBLIC[kind].classes
    if images.labels is None or images.num_classes != classes or images.image_size != 32:
        raise InputRefused(
            f"{show(source)}: {images.num_classes} classes of {images.image_size} pixels are not {kind}, "
            f'which has {classes} of 32. Read it as the data set "parquet".'
        )
    return images


def limited(images: ImageSet, limit: int | None, seed: int) -> ImageSet:
    """A subset of `limit` images, or all. Raises ConfigError where there are fewer."""
    if limit is None:
        return images
    if limit > len(images) or images.labels is None:
        raise ConfigError(f"{images.name}: a limit of {limit} images exceeds the {len(images)} there are; lower it.")
    return images.subset(stratified(images.labels, limit, seed))


def stratified(labels: npt.NDArray[np.int64], limit: int, seed: int) -> npt.NDArray[np.int64]:
    """Sorted indices of `limit` images, each class in its proportion to within one; a function of the seed."""
    classes, counts = np.unique(labels, return_counts=True)
    shares, remainders = np.divmod(limit * counts, len(labels))
    shares[np.argsort(-remainders, kind="stable")[: limit - shares.sum()]] += 1
    rng = numpy_generator(seed, "data", "limit")
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:share] for label, share in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
