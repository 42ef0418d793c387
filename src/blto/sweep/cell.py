"""The work on one cell: its experiment, run to its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blto import experiment
from blto.experiment import Environment, ExperimentSpec
from blto.records import RunStore
from blto.runtime.jobs import Tell
from blto.runtime.progress import Told


def run_cell(content: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Run one experiment, going on from what an earlier attempt has left.

    Args:
        content: `spec`, `store`, `group` (of the sweep's workers), `data_root` and `device`, plain data.
        tell: where progress goes.

    Returns:
        `metrics` of the record, and whether the record was there already (`reused`).

    Raises:
        BltoError: of the experiment.
    """
    spec = ExperimentSpec.parse(content["spec"])
    data_root = content["data_root"]
    environment = Environment(
        store=RunStore(Path(content["store"]), group=content["group"]),
        data_root=None if data_root is None else Path(data_root),
        device=content["device"],
        resume=True,
        progress=Told(tell),
    )
    reused = (environment.store.folder(spec.run_id) / "record.json").exists()
    record = experiment.run(spec, environment)
    return {"metrics": record.model_dump(mode="json")["metrics"], "reused": reused}
