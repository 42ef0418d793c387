"""The mark that keeps a set which was poisoned on purpose from being taken for a clean one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from blto.errors import Mismatch
from blto.files import show
from blto.files.parquet import read_parquet_metadata

MARKER_FILE = "POISONED.json"
MARKER_KEY = "blto_poisoned"


def refuse_poisoned(folder: Path, parquet_files: Sequence[Path] = ()) -> None:
    """Raise Mismatch where the folder, the one that holds it, or the metadata of a parquet file carries the mark."""
    real = folder.resolve()
    marks = [place / MARKER_FILE for place in (real, real.parent) if os.path.lexists(place / MARKER_FILE)]
    marks += [file for file in parquet_files if MARKER_KEY in read_parquet_metadata(file)]
    if marks:
        raise Mismatch(
            f"{show(folder, 80)}: marked as poisoned on purpose ({show(marks[0].name, 40)}). "
            "Use the clean set; only `blto pretrain --poisoned` (in Python poisoned=True) takes a poisoned one."
        )
