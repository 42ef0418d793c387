"""Snapshots of an encoder along its training, so that any trigger can be followed through it afterwards.

A clean twin is shared by all attacks of a seed, and is trained before their triggers exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blto.files import make_directory
from blto.models.checkpoints import load_encoder, save_encoder
from blto.models.encoder import Encoder


class SnapshotObserver:
    """Saves the encoder (fp16) as `epoch-<number>.safetensors` each time it is called.

    Args:
        folder: where snapshots go; made if need be.
        backbone, image_size: as in `save_encoder`.
    """

    def __init__(self, folder: Path, backbone: Mapping[str, Any], image_size: int) -> None:
        make_directory(folder)
        self.folder, self.backbone, self.image_size = folder, backbone, image_size

    def __call__(self, encoder: Encoder, epoch: int) -> Mapping[str, float]:
        """Save; there is nothing to report."""
        save_encoder(self.folder / f"epoch-{epoch:05d}.safetensors", encoder, self.backbone, self.image_size)
        return {}


def snapshots(folder: Path) -> Iterator[tuple[int, Encoder]]:
    """The snapshots of a folder as (epoch, encoder), by epoch."""
    for path in sorted(folder.glob("epoch-*.safetensors")):
        yield int(path.stem.removeprefix("epoch-")), load_encoder(path)
