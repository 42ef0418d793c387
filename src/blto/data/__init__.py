"""Image sets by name, and the augmented views that training draws from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from blto.data.images import ImageSet, Split
from blto.errors import ConfigError
from blto.registry import Registry
from blto.runtime.progress import ON_STANDARD_ERROR, Progress


class Reader(Protocol):
    """What every data set class offers."""

    def load(
        self,
        split: Split,
        root: Path | None = None,
        *,
        poisoned: bool = False,
        progress: Progress = ON_STANDARD_ERROR,
    ) -> ImageSet:
        """Read one split.

        Args:
            split: "train" or "test".
            root: where files are looked for.
            poisoned: read the set even where it is marked as poisoned on purpose.
            progress: where a download shows.
        """


DATASETS: Registry[Reader] = Registry(
    "dataset",
    {
        "cifar10": "blto.data.cifar:Cifar10",
        "cifar100": "blto.data.cifar:Cifar100",
        "image_folder": "blto.data.folder:ImageFolder",
        "parquet": "blto.data.parquet:Parquet",
        "synthetic": "blto.data.synthetic:Synthetic",
    },
)


def load(
    spec: Mapping[str, Any] | str,
    *,
    data_root: str | os.PathLike[str] | None = None,
    split: Split = "train",
    poisoned: bool = False,
    progress: Progress = ON_STANDARD_ERROR,
) -> ImageSet:
    """Load one split of the data set that `spec` names.

    Args:
        spec: a name, or `{"name": ..., **arguments}`.
        data_root: where files are looked for; the variable BLTO_DATA where None or empty.
        split: "train" or "test".
        poisoned: permit a set that is marked as poisoned on purpose.
        progress: where a download shows.

    Raises:
        ConfigError: an unknown name or argument; NO-DATA where the files are not there.
        InputRefused: a damaged file or image, named.
        Mismatch: the set is marked as poisoned and `poisoned` is not set.
    """
    if split not in ("train", "test"):
        raise ConfigError(f'split is "{split}"; give "train" or "test".')
    folder = data_root or os.environ.get("BLTO_DATA")
    return DATASETS.build(spec).load(split, Path(folder) if folder else None, poisoned=poisoned, progress=progress)
