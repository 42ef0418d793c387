"""The main job on embedded data in minutes on two cores: BLTO and its untrained generator, beside a clean twin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Unpack

from blto import api
from blto.api import Options
from blto.records import RunRecord

BACKBONE = {"name": "small_resnet", "width": 24}
SIMCLR = {"name": "simclr", "temperature": 0.2}
CONFIG: dict[str, Any] = {
    "data": "synthetic",
    "attack": {
        "name": "blto",
        "target_class": 1,
        "poison_rate": 0.05,  # the most that the demo allows itself: half of the target class; the paper's is 0.01
        "bilevel": {
            "rounds": 400,
            "reinitialise_every": 200,
            "outer_batch_size": 64,
            "outer_lr": 0.002,
            "surrogate": {
                "method": SIMCLR,
                "backbone": BACKBONE,
                "views": "simsiam_cifar",
                "batch_size": 256,
                "optimizer": {"lr": 0.12},
            },
        },
    },
    "pretraining": {
        "method": SIMCLR,
        "backbone": BACKBONE,
        "views": "simsiam_cifar",
        "batch_size": 256,
        "epochs": 16,
        "optimizer": {"lr": 0.12},
    },
    "controls": ["clean", "untrained_generator"],
}


def demo(*, out: str | os.PathLike[str] = "runs/demo", seed: int = 0, **options: Unpack[Options]) -> list[RunRecord]:
    """Run the demo; returns the records of the clean run, the untrained generator and BLTO, which share a clean twin.

    Args:
        out: folder of the runs and of `report.html`; a run that is already there is not run again.
        seed: of every choice.
        options: as in `blto.run`; `store` plays no part.
    """
    options["store"] = out
    attack, *controls = api.run(CONFIG, seed=seed, **options)
    records = [*controls, attack]
    api.report([record.run_id for record in records], out=Path(out) / "report.html", store=out)
    return records
