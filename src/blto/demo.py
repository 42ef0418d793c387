"""The main job on embedded data in minutes on two cores: BLTO and its untrained generator, beside a clean twin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Unpack

from blto import api
from blto.configuration import Options
from blto.pretraining.spec import Engine
from blto.records import RunRecord

RECIPE: dict[str, Any] = {
    "method": {"name": "simclr", "temperature": 0.5},
    "backbone": {"name": "small_resnet", "width": 32},
    "views": {"name": "simclr_cifar", "grayscale_probability": 0.5},  # colours vary freely in this data: look past them
    "batch_size": 64,  # 4,000 images make few steps an epoch otherwise
    "optimizer": {"lr": 0.12},
}
EPOCHS = 15
STEPS_PER_EPOCH = 4000 // 64
CONFIG: dict[str, Any] = {
    "data": "synthetic",
    "attack": {
        "name": "blto",
        "target_class": 1,
        "poison_rate": 0.05,  # the most that the demo allows itself: half of the target class; the paper's is 0.01
        "epsilon": 32 / 255,  # four times the paper's, for data of high contrast
        "bilevel": {
            # Each round: a surrogate trained on the trigger so far, then the trigger trained on that surrogate until
            # it is about as near to the target class as the class itself.
            "rounds": 2,
            "inner_steps": EPOCHS * STEPS_PER_EPOCH,
            "outer_steps": 500,
            "reinitialise_every": 1,
            "outer_batch_size": 64,
            "surrogate": RECIPE,
        },
    },
    "pretraining": {**RECIPE, "epochs": EPOCHS, "warmup_epochs": 1},
    "controls": ["clean", "untrained_generator"],
}


def demo(
    *,
    out: str | os.PathLike[str] = "runs/demo",
    seed: int = 0,
    engine: Engine | None = None,
    **options: Unpack[Options],
) -> list[RunRecord]:
    """Run the demo; returns the records of the clean run, the untrained generator and BLTO, which share a clean twin.

    Args:
        out: folder of the runs and of `report.html`; a run that is already there is not run again.
        seed: of every choice.
        engine, options: as in `blto.run`; `store` plays no part.
    """
    options["store"] = out
    attack, *controls = api.run(CONFIG, seed=seed, engine=engine, **options)
    records = [*controls, attack]
    api.report([record.run_id for record in records], out=Path(out) / "report.html", store=out)
    return records
