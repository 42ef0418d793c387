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
from torch import nn

from blto.data.images import ImageSet
from blto.errors import ConfigError
from blto.evaluation.features import Features, extract
from blto.evaluation.geometry import similarity
from blto.evaluation.metrics import backdoor_metrics, rate
from blto.evaluation.probes import fit_probe
from blto.records import Metric

Images = npt.NDArray[np.uint8]


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
