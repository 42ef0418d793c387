"""An experiment of seconds, as plain data: every stage runs, nothing is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blto import experiment
from blto.experiment import Environment, ExperimentSpec
from blto.records import RunStore
from tests.factories import TINY_BACKBONE, TINY_METHODS

TINY_EXPERIMENT: dict[str, Any] = {
    "seed": 3,
    "data": {"name": "synthetic", "train_size": 120, "test_size": 60, "image_size": 16},
    "attack": {
        "name": "blto",
        "target_class": 1,
        "poison_rate": 0.05,
        "generator": {"name": "unet", "width": 4},
        "bilevel": {
            "rounds": 4,
            "reinitialise_every": 2,
            "outer_batch_size": 8,
            "surrogate": {
                "method": TINY_METHODS["simsiam"],
                "backbone": TINY_BACKBONE,
                "views": "simsiam_cifar",
                "batch_size": 16,
                "precision": "fp32",
            },
        },
    },
    "pretraining": {
        "method": TINY_METHODS["simclr"],
        "backbone": TINY_BACKBONE,
        "batch_size": 16,
        "epochs": 2,
        "precision": "fp32",
    },
}


def export_run(store: RunStore, given: dict[str, Any], out: Path, cell: str) -> None:
    """Run an experiment, and leave of it in `out` what a sweep's export would."""
    spec = ExperimentSpec.parse(given)
    twin = experiment.run(spec, Environment(store, device="cpu")).provenance["stages"]["clean_twin"]
    (out / "clean_twins").mkdir(parents=True, exist_ok=True)
    encoder = (store.root / "stages" / twin / "encoder.safetensors").read_bytes()
    (out / "clean_twins" / f"{twin}.safetensors").write_bytes(encoder)
    store.folder(spec.run_id).rename(out / f"{cell}-s{spec.seed}-{spec.run_id[-10:]}")
