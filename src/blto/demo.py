"""The main job on embedded data in minutes on two cores: BLTO and its untrained generator, beside a clean twin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Unpack

from blto import api
from blto.api import Options
from blto.records import RunRecord

POISON_RATE = 0.05
"""The most that the demo allows itself; printed with the results."""

_PRETRAINING: dict[str, Any] = {
    "method": "simclr",
    "backbone": {"name": "small_resnet", "width": 32},
    "batch_size": 256,
    "epochs": 60,
    "warmup_epochs": 2,
}
_ATTACKS: tuple[dict[str, Any], ...] = (
    {"name": "clean", "target_class": 0},
    {"name": "untrained_generator", "target_class": 0, "poison_rate": POISON_RATE},
    {
        "name": "blto",
        "target_class": 0,
        "poison_rate": POISON_RATE,
        "bilevel": {
            "rounds": 400,
            "reinitialise_every": 200,
            "outer_batch_size": 64,
            "surrogate": {"method": "simsiam", "backbone": {"name": "small_resnet", "width": 32}, "batch_size": 128},
        },
    },
)


def demo(*, out: str | os.PathLike[str] = "runs/demo", seed: int = 0, **options: Unpack[Options]) -> list[RunRecord]:
    """Run the demo; returns the records of the clean run, the untrained generator and BLTO, which share a clean twin.

    Args:
        out: folder of the runs and of `report.html`; a run that is already there is not run again.
        seed: of every choice.
        options: as in `blto.run`; `store` plays no part.
    """
    options["store"] = out
    records = [
        api.run({"seed": seed, "data": "synthetic", "attack": attack, "pretraining": _PRETRAINING}, **options)
        for attack in _ATTACKS
    ]
    api.report([record.run_id for record in records], out=Path(out) / "report.html", store=out)
    return records
