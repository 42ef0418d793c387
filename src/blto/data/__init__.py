"""Image sets by name, and the augmented views that training draws from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from blto.data.images import ImageSet
from blto.registry import Registry


class Reader(Protocol):
    """What every data set class offers."""

    def load(self, split: Literal["train", "test"], root: Path | None = None) -> ImageSet:
        """Read one split; `root` is where files are looked for."""


DATASETS: Registry[Reader] = Registry(
    "dataset",
    {
        "synthetic": "blto.data.synthetic:Synthetic",
    },
)


def load(
    spec: Mapping[str, Any] | str,
    *,
    data_root: Path | None = None,
    split: Literal["train", "test"] = "train",
) -> ImageSet:
    """Load one split of the data set that `spec` names.

    Args:
        spec: a name, or `{"name": ..., **arguments}`.
        data_root: where files are looked for; the variable BLTO_DATA where None.
        split: "train" or "test".
    """
    if data_root is None and os.environ.get("BLTO_DATA"):
        data_root = Path(os.environ["BLTO_DATA"])
    return DATASETS.build(spec).load(split, data_root)
