"""What became of each cell: one small sealed file per cell, written whole or not at all.

    <store>/sweeps/<sweep>/<cell id>.json

A cell without a whole file has not happened; run again, it finds its record in the store, if there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blto.errors import BltoError, InputRefused
from blto.files import safe_join
from blto.records import HEADLINE_PROBE, Metric, read_sealed, without_private_text, write_sealed

FOLDER = "sweeps"


class CellResult(BaseModel):
    """One cell's result.

    Attributes:
        cell: the cell's id.
        run_id: the run's folder in the store.
        status: "done"; "failed", which is not run again unless asked for; "stopped": it goes on where it was.
        seconds: of wall time spent on it, over all calls that ended in order.
        reused: its record was there already, so `seconds` says nothing of how long such a cell takes.
        metrics: the record's.
        code, error, exit_code: of a failed cell, as the command line prints them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    cell: str
    run_id: str
    status: Literal["done", "failed", "stopped"]
    seconds: Annotated[float, Field(ge=0)]
    reused: bool = False
    metrics: dict[str, dict[str, Metric]] = {}
    code: str = ""
    error: str = ""
    exit_code: int = 0

    def metric(self, name: str, probe: str = HEADLINE_PROBE) -> Metric | None:
        """One metric, or None where there is none."""
        return self.metrics.get(probe, {}).get(name)

    def as_error(self) -> BltoError:
        """The failure as the error that it was."""
        error = BltoError(self.error, code=self.code)
        error.exit_code = self.exit_code
        return error


class Results:
    """The results of one sweep. Creating the object touches nothing on disk.

    Args:
        store: the folder of the runs.
        sweep: the sweep's name.
    """

    def __init__(self, store: Path, sweep: str) -> None:
        self.folder = store / FOLDER / sweep

    def file(self, cell: str) -> Path:
        """Where a cell's result is."""
        return safe_join(self.folder, f"{cell}.json")

    def load(self, cell: str) -> CellResult | None:
        """A cell's result; None where there is no whole one.

        Raises:
            Mismatch: it was written by a newer blto.
        """
        file = self.file(cell)
        if not file.is_file():
            return None
        try:
            return CellResult.model_validate(read_sealed(file, "result"))
        except (InputRefused, ValidationError):
            return None

    def save(self, result: CellResult) -> None:
        """Write a result. Raises ResourceExhausted; the file is then as it was."""
        content: dict[str, Any] = without_private_text(result.model_dump(mode="json"))
        write_sealed(self.file(result.cell), content)
