"""One encoder against its clean twin: all metrics, similarities and the numbers behind the figures.

Sees encoders, images and triggered images; knows no attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.data.views import Views
from blto.errors import ConfigError
from blto.evaluation.features import Features, device_of, evaluating, extract
from blto.evaluation.geometry import alignment, similarity, uniformity
from blto.evaluation.metrics import backdoor_metrics, rate
from blto.evaluation.probes import fit_probe
from blto.records import Metric

Images = npt.NDArray[np.uint8]
FOLLOWED = 512
"""Images followed along a training: enough for a curve, cheap enough for every snapshot."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_backdoor` found.

    Attributes:
        metrics: probe -> name -> Metric; the names of `metrics.METRIC_NAMES`, and the clean twin's own accuracy.
        similarity: of the poisoned encoder, as `geometry.similarity` names them.
        clean, triggered: features of the test images on the poisoned encoder.
    """

    metrics: dict[str, dict[str, Metric]]
    similarity: dict[str, float]
    clean: Features
    triggered: Features


def evaluate_backdoor(
    encoder: nn.Module,
    twin: nn.Module,
    *,
    train: ImageSet,
    test: ImageSet,
    triggered: Images,
    target_class: int,
    probes: Mapping[str, Mapping[str, Any]],
) -> Evaluation:
    """Fit every probe on clean, labeled training images, once per encoder, and read off the metrics.

    Args:
        encoder: pretrained on the poisoned set.
        twin: the same without poison.
        train: clean, labeled images that the probes are fitted on.
        test: labeled test images, disjoint from `train`.
        triggered: uint8, every test image with the trigger, in the same order.
        target_class: the attack's.
        probes: name -> options.
    """
    if train.labels is None or test.labels is None:
        raise ConfigError(f"{train.name}: probes need labeled images; give a data set with classes.")
    bank, twin_bank = (extract(network, train.images, train.labels) for network in (encoder, twin))
    clean, twin_clean = (extract(network, test.images, test.labels) for network in (encoder, twin))
    changed, twin_changed = (extract(network, triggered, test.labels) for network in (encoder, twin))
    metrics: dict[str, dict[str, Metric]] = {}
    for name, options in probes.items():
        predict = fit_probe(name, bank, train.num_classes, **options)
        predict_twin = fit_probe(name, twin_bank, train.num_classes, **options)
        metrics[name] = backdoor_metrics(
            labels=test.labels,
            target_class=target_class,
            clean_predictions=predict(clean.vectors),
            triggered_predictions=predict(changed.vectors),
            twin_triggered_predictions=predict_twin(twin_changed.vectors),
            num_classes=train.num_classes,
        )
        metrics[name]["clean_accuracy_clean_twin"] = rate(predict_twin(twin_clean.vectors) == test.labels)
    other, own = torch.from_numpy(test.labels != target_class), torch.from_numpy(test.labels == target_class)
    near = similarity(
        triggered=changed.vectors[other],
        clean=clean.vectors[other],
        target=clean.vectors[own],
        references=bank.vectors[torch.from_numpy(train.labels == target_class)],
    )
    return Evaluation(metrics, near, clean, changed)


class Follower:
    """Measures one trigger on any encoder of a trajectory, always on the same few images and views.

    Args:
        train, test, triggered, target_class: as in `evaluate_backdoor`; the first images of each kind are used.
        views: the victim's augmentation, for alignment.
    """

    def __init__(self, train: ImageSet, test: ImageSet, triggered: Images, target_class: int, views: Views) -> None:
        assert train.labels is not None  # a trajectory is drawn after `evaluate_backdoor`,
        assert test.labels is not None  # which refuses sets without labels
        other, own = (
            np.flatnonzero(chosen)[:FOLLOWED] for chosen in (test.labels != target_class, test.labels == target_class)
        )
        references = np.flatnonzero(train.labels == target_class)[:FOLLOWED]
        self._sets = {
            "triggered": triggered[other],
            "clean": test.images[other],
            "target": test.images[own],
            "references": train.images[references],
        }
        drawn = (views.draw(seed=0, epoch=0, samples=other, view=view) for view in (0, 1))
        self._views = [views.fast(test.images, other, parameters) for parameters in drawn]

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """One row: centred similarity to the target of triggered, clean and target images; alignment; uniformity."""
        found = {name: extract(encoder, images).vectors for name, images in self._sets.items()}
        row: dict[str, float] = {}
        for name, key in (("trigger", "triggered"), ("clean", "clean"), ("target", "target")):
            row[name] = similarity(**{**found, "triggered": found[key]})["centred"]
        with evaluating(encoder), torch.inference_mode():
            device = device_of(encoder)
            first, second = (_float(encoder(view.to(device))) for view in self._views)
        row["alignment"], row["uniformity"] = alignment(first, second), uniformity(found["clean"])
        return row


def _float(features: Tensor) -> Tensor:
    return features.float().cpu()
