"""Piles of images for the tests of the scan: drawn shapes as files, some with a patch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from blto.attacks.ssl_backdoor import draw_patch
from blto.audit.pile.chunks import score_chunk
from blto.audit.pile.scan import DataScan, scan_pile
from blto.audit.pile.sources import Folder
from blto.data.images import ImageSet
from blto.data.synthetic import Synthetic
from blto.files.images import encode_png
from blto.poisoning import PatchTrigger, apply_to_uint8
from blto.records import RunStore
from blto.runtime.executors import Serial

SUSPECTS, CLEAN, EVERY = 400, 300, 20


@cache
def shapes() -> ImageSet:
    return Synthetic(train_size=SUSPECTS + CLEAN).load("train")


@cache
def patched() -> np.ndarray:
    """The suspects, of which one in twenty has a patch."""
    trigger = PatchTrigger(draw_patch(7, seed=0), seed=0, placement=(0.25, 0.75), test_placement=(0.1, 0.9))
    images = shapes().images[:SUSPECTS].copy()
    images[::EVERY] = apply_to_uint8(trigger, images[::EVERY])
    return images


def write(folder: Path, images: np.ndarray, encode: Callable[[np.ndarray], bytes] = encode_png) -> Path:
    """One file an image, in two folders."""
    for row, image in enumerate(images):
        place = folder / f"{row % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row:05d}.png").write_bytes(encode(np.ascontiguousarray(image.transpose(1, 2, 0))))
    return folder


def scanned(suspects: Path, clean: Path | None, store: Path, **options: Any) -> DataScan:
    """A scan of folders, in this process."""
    known = None if clean is None else Folder(clean)
    given = {"executors": Serial, "store": RunStore(store), **options}
    return scan_pile(Folder(suspects), known, **given)


def without_times(scan: DataScan) -> DataScan:
    """What has to be the same however often, wherever and in how many pieces it was made."""
    found = tuple(replace(each, seconds=0.0) for each in scan.found)
    return replace(scan, found=found, seconds=0.0)


def score_and_die_once(content: dict[str, Any], tell: Any) -> dict[str, Any]:
    """As `score_chunk`, but the third part kills its worker the first time."""
    part = content["part"]
    marker = Path(part.folder).parent / "died"
    if part.names[0] == "0/00040.png" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return score_chunk(content, tell)


def score_and_die(content: dict[str, Any], tell: Any) -> dict[str, Any]:
    """As `score_chunk`, but the third part kills its worker every time."""
    if content["part"].names[0] == "0/00040.png":
        os.kill(os.getpid(), signal.SIGKILL)
    return score_chunk(content, tell)


def score_and_ask_to_stop(content: dict[str, Any], tell: Any) -> dict[str, Any]:
    """As `score_chunk`, but a signal comes meanwhile."""
    os.kill(os.getpid(), signal.SIGTERM)
    return score_chunk(content, tell)


def score_slowly(content: dict[str, Any], tell: Any) -> dict[str, Any]:
    """As `score_chunk`, but long enough to be killed, with a note of the process in whose hands it is."""
    folder = Path(content["part"].folder)
    notes = folder.parent / "begun"
    notes.mkdir(exist_ok=True)
    (notes / f"{os.getpid()}-{folder.name}_{content['part'].names[0].replace('/', '_')}").touch()
    time.sleep(0.5)
    return score_chunk(content, tell)
