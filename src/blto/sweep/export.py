"""What is worth keeping of a sweep's finished cells, copied to where it can be committed.

    <out>/<cell id>/result.json  record.json  log.jsonl  encoder.safetensors  trigger.safetensors
    <out>/clean_twins/<stage>.safetensors        once for all the cells that share it

Encoders are fp16, as every run writes them (`models.checkpoints`). Without a learned trigger the set that an encoder
was trained on cannot be made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blto.errors import InputRefused, Mismatch
from blto.experiment.outcome import ENCODER, LOG, TRIGGER
from blto.files import atomic_write, canonical_json, read_bytes, safe_join, sha256_bytes, show
from blto.files.atomic import remove_file
from blto.records import RunRecord, RunStore
from blto.sweep.plan import Cell
from blto.sweep.results import Results

MAX_BYTES = {ENCODER: 1_000_000, TRIGGER: 2_000_000}
"""A learned trigger is kept in fp32: its poisons are to be the same bytes."""


@dataclass
class Exported:
    """What an export did.

    Attributes:
        copied: files that are new or had changed.
        unchanged: files that were there already.
        left_out: one line for each that was not copied, and why.
    """

    copied: list[Path] = field(default_factory=list)
    unchanged: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def keep(self, target: Path, data: bytes) -> None:
        """Write one file, unless the same is there."""
        if target.is_file() and read_bytes(target) == data:
            self.unchanged.append(target)
            return
        atomic_write(target, data)
        self.copied.append(target)

    def keep_json(self, target: Path, content: dict[str, Any] | None) -> None:
        """The same for JSON; where there is none, none is left of an earlier export."""
        if content is not None:
            self.keep(target, canonical_json(content) + b"\n")
        elif target.exists():
            remove_file(target)


def export_cells(cells: Sequence[Cell], results: Results, store: RunStore, out: Path) -> Exported:
    """Copy the artefacts of every cell that is done; nothing is run, and a sweep may be running meanwhile.

    Raises:
        Mismatch: a file is not the one that its record vouches for.
        ResourceExhausted: `out` cannot be written.
    """
    exported = Exported()
    for cell in cells:
        result = results.load(cell.id)
        if result is None or result.status != "done":
            continue
        try:
            record = store.load(store.folder(result.run_id))
        except InputRefused as error:
            exported.left_out.append(f"{show(cell.id)}: {error}")
            continue
        _copy(results.file(cell.id), out / cell.id / "result.json", exported)
        for source, name in _artefacts(store, record):
            target = out / (name if "/" in name else f"{cell.id}/{name}")
            size = source.stat().st_size if source.is_file() else None
            if size is None:
                exported.left_out.append(f"{show(cell.id)}: {show(source)} is not there.")
            elif size > (most := MAX_BYTES.get(source.name, size)):
                line = f"{show(cell.id)}: {show(source)} has {size:,} bytes, more than {most:,}."
                exported.left_out.append(line)
            else:
                _copy(source, target, exported, record.artefacts.get(name))
    return exported


def _artefacts(store: RunStore, record: RunRecord) -> Iterator[tuple[Path, str]]:
    """The files of a run that are kept, and their names; a slash in a name: beside the cells."""
    folder = store.folder(record.run_id)
    yield folder / "record.json", "record.json"
    for name in (LOG, ENCODER, TRIGGER):
        yield folder / name, name
    stages = record.provenance.get("stages", {})
    twin = stages.get("clean_twin")
    if twin and twin != stages.get("victim"):  # of a clean run they are one
        yield safe_join(store.root / "stages", twin) / ENCODER, f"clean_twins/{twin}.safetensors"


def _copy(source: Path, target: Path, exported: Exported, recorded: str | None = None) -> None:
    """Copy one file, unless the same is there."""
    if target in exported.copied or target in exported.unchanged:
        return
    data = read_bytes(source)
    if recorded is not None and sha256_bytes(data) != recorded:
        raise Mismatch(f"{show(source)}: is not the file that was recorded. Run the same spec again.")
    exported.keep(target, data)
