"""The folder of a run, and its figures as its record vouches for them."""

from __future__ import annotations

import os
from pathlib import Path

from blto.errors import Mismatch
from blto.files import read_bytes, safe_join, sha256_bytes, show
from blto.records import RunRecord, RunStore


def recorded_figures(record: RunRecord, folder: Path) -> dict[str, str]:
    """Name -> SVG text of every figure of a run. Raises Mismatch where one was altered."""
    figures = {}
    for name, recorded in record.artefacts.items():
        if name.startswith("figures/") and name.endswith(".svg"):
            data = read_bytes(safe_join(folder, name))
            if sha256_bytes(data) != recorded:
                raise Mismatch(f"{show(folder / name)}: is not the figure that was recorded. Run the same spec again.")
            figures[Path(name).stem] = data.decode(errors="replace")
    return figures


def folder_of(run: str | os.PathLike[str], store: RunStore) -> Path:
    """The folder of a run that was named by its id, its folder or its record."""
    path = store.root / run if (store.root / run).is_dir() else Path(run)
    return path if path.is_dir() else path.parent
