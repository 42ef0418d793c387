"""What a finished run leaves in its folder: metrics, figures, artefacts, the log and where it all came from."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blto import analysis
from blto.data.images import ImageSet
from blto.data.views import ViewRecipe, Views
from blto.evaluation import Follower, evaluate_backdoor, measure_stealth
from blto.files import (
    atomic_write,
    canonical_json,
    make_directory,
    read_jsonl,
    sha256_file,
    write_json,
    write_text,
)
from blto.files.yaml import dump_yaml
from blto.models.checkpoints import load_encoder
from blto.poisoning import PoisonedDataset, Trigger, apply_to_uint8
from blto.poisoning.manifest import build_manifest
from blto.pretraining.snapshots import snapshots
from blto.records import RunRecord, StageFolder, took
from blto.runtime.device import processor_name
from blto.runtime.interrupts import heed_signals

TRIGGER, ENCODER, LOG = "trigger.safetensors", "encoder.safetensors", "log.jsonl"


def conclude(
    spec: Mapping[str, Any],
    folder: Path,
    *,
    views: ViewRecipe,
    train: ImageSet,
    test: ImageSet,
    trigger: Trigger,
    poisoned: PoisonedDataset,
    stages: Mapping[str, StageFolder],
    device: str,
) -> RunRecord:
    """Measure the victim beside its twin; write figures and artefacts; return the record that vouches for them.

    Args:
        spec: the resolved spec, plain data.
        folder: the run's; its name is the run id.
        views: the victim's augmentation.
        train, test: clean and labeled.
        trigger: on the CPU, where the poisons were made: the test images get the same bytes on every device.
        poisoned: the victim's training set.
        stages: "craft", "victim" and "clean_twin", complete.
        device: "cpu" or "cuda", where the encoders are run.
    """
    target_class = poisoned.plan.target_class
    encoder, twin = (load_encoder(stages[name].path / ENCODER).to(device) for name in ("victim", "clean_twin"))
    triggered = apply_to_uint8(trigger.at_test(), test.images)
    found = evaluate_backdoor(
        encoder,
        twin,
        train=train,
        test=test,
        triggered=triggered,
        target_class=target_class,
        probes=spec["probes"],
    )
    follow = Follower(train, test, triggered, target_class, Views(views, test.image_size), spec["probes"])
    record = RunRecord(
        run_id=folder.name,
        spec=dict(spec),
        metrics=found.metrics,
        took=took(found.metrics),
        similarity=found.similarity,
        stealth=measure_stealth(test.images, triggered),
        trajectory=trajectory(stages["victim"], follow, device),
        trajectory_clean_twin=trajectory(stages["clean_twin"], follow, device),
        crafting=stages["craft"].facts["crafting"],
        provenance=provenance(train, test, poisoned, trigger, stages, device),
    )
    figures = analysis.record_figures(record)
    assert test.labels is not None  # `evaluate_backdoor` refuses a set without them
    figures |= analysis.test_set_figures(
        test.images,
        triggered,
        test.labels,
        test.class_names,
        target_class,
        features=found.clean.vectors,
        triggered_features=found.triggered.vectors,
    )
    make_directory(folder / "figures")
    for name, (figure, columns) in figures.items():
        analysis.save_figure(figure, folder / "figures" / name, columns)
    for name, stage in ((TRIGGER, stages["craft"]), (ENCODER, stages["victim"])):
        atomic_write(folder / name, (stage.path / name).read_bytes())
    manifest = build_manifest(poisoned, trigger, seeds={"run": spec["seed"]})
    write_json(folder / "poison_manifest.json", manifest.model_dump(mode="json"))
    write_text(folder / "spec.yaml", dump_yaml(record.spec))
    write_text(folder / LOG, log_of(stages))
    names = [TRIGGER, ENCODER, "poison_manifest.json", "spec.yaml", LOG]
    names += [f"figures/{name}.{suffix}" for name in figures for suffix in ("svg", "csv")]
    return record.model_copy(update={"artefacts": {name: sha256_file(folder / name) for name in names}})


def trajectory(stage: StageFolder, follow: Follower, device: str) -> list[dict[str, Any]]:
    """Loss and measured values at every snapshot of one training."""
    rows = {int(row["epoch"]): row for row in stage.facts["trajectory"]}
    entries: list[dict[str, Any]] = []
    for epoch, encoder in snapshots(stage.path / "snapshots"):
        heed_signals()
        entries.append({**rows[epoch], **follow(encoder.to(device))})
    return entries


def log_of(stages: Mapping[str, StageFolder]) -> str:
    """The stages' logs as one, each line with its `stage`: JSON, a line for each logged step.

    It tells what was computed and not how often it took a start: no clock, no resumption, and steps that were taken
    again after a kill stand once. So the log of a resumed run is that of an uninterrupted one.
    """
    text = ""
    for name, stage in stages.items():
        lines: dict[tuple[Any, ...], dict[str, Any]] = {}
        for line in read_jsonl(stage.path / LOG) if (stage.path / LOG).exists() else []:
            if line["event"] != "resumed":
                lines[line["event"], line.get("epoch"), line.get("step")] = {**line, "stage": name}
        text += "".join(canonical_json(line).decode() + "\n" for line in lines.values())
    return text


def provenance(
    train: ImageSet,
    test: ImageSet,
    poisoned: PoisonedDataset,
    trigger: Trigger,
    stages: Mapping[str, StageFolder],
    device: str,
) -> dict[str, Any]:
    """Versions, machine, hashes and times: what it takes to trust a number, or to make it again.

    `machine` is where the run was evaluated; `trained_on` is where, and in which arithmetic, each stage was trained.
    """
    of_target_class = int(np.count_nonzero(train.labels == poisoned.plan.target_class))
    libraries = ("blto", "torch", "torchvision", "lightly", "numpy", "numba", "scikit-learn")
    facts = {name: stage.facts for name, stage in stages.items()}
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "machine": {
            "architecture": platform.machine(),
            "device": device,
            "processor": processor_name(device),
            "threads": torch.get_num_threads(),
        },
        "trained_on": {name: each["arithmetic"] for name, each in facts.items() if each.get("arithmetic")},
        "data": {
            "name": train.name,
            "class_names": list(train.class_names),
            "train_images": len(train),
            "test_images": len(test),
            "train_sha256": train.content_hash,
            "test_sha256": test.content_hash,
        },
        "poison": {
            "images": poisoned.n_poisoned,
            "poison_rate": poisoned.plan.poison_rate,
            "share_of_target_class": poisoned.n_poisoned / of_target_class,
            "epsilon_reached": poisoned.epsilon_reached,
            "trigger_sha256": trigger.identity,
        },
        "seconds": {name: each["seconds"] for name, each in facts.items()},
        "stages": {name: stage.path.name for name, stage in stages.items()},
    }
