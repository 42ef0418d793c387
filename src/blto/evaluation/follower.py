"""One trigger along a whole training: what every snapshot of an encoder makes of it, cheaply.

A single epoch is a poor summary: in public logs of CTRL the ASR moves between 1% and 99% while the accuracy is smooth.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.data.views import Views
from blto.evaluation.features import device_of, evaluating, extract
from blto.evaluation.geometry import alignment, similarity, uniformity
from blto.evaluation.metrics import backdoor_metrics
from blto.evaluation.probes import PROBES, fit_probe
from blto.runtime.seeds import numpy_generator

Images = npt.NDArray[np.uint8]
FOLLOWED = 512
"""Images of each kind whose place is followed: enough for a curve, cheap enough for every snapshot."""
JUDGED, BANK = 2_048, 10_000
"""Test images that the probes judge, and training images that they are fitted on, at most; drawn once."""
JUDGED_METRICS = ("asr", "untriggered_rate", "clean_accuracy")


class Follower:
    """Measures one trigger on any encoder of a trajectory, always on the same few images and views.

    Args:
        train, test, triggered, target_class: as in `evaluate_backdoor`.
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
        bank, judged = (
            numpy_generator(0, "select", "followed", part).permutation(len(images))[:count]
            for part, images, count in (("bank", train, BANK), ("judged", test, JUDGED))
        )
        self._target_class = target_class
        self._bank, self._test, self._triggered = train.subset(bank), test.subset(judged), triggered[judged]

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """One row: centred similarity to the target of triggered, clean and target images ("trigger", "clean",
        "target"); "alignment"; "uniformity"; and `JUDGED_METRICS` of each probe, as `metrics` defines them, each with
        the probe's name in front ("linear_asr").

        Raises:
            Diverged: a feature is not finite, or the linear probe does not converge.
        """
        found = {name: extract(encoder, images).vectors for name, images in self._sets.items()}
        row: dict[str, float] = {}
        for name, key in (("trigger", "triggered"), ("clean", "clean"), ("target", "target")):
            row[name] = similarity(**{**found, "triggered": found[key]})["centred"]
        with evaluating(encoder), torch.inference_mode():
            device = device_of(encoder)
            first, second = (_float(encoder(view.to(device))) for view in self._views)
        row["alignment"], row["uniformity"] = alignment(first, second), uniformity(found["clean"])
        return row | self._judgement(encoder)

    def _judgement(self, encoder: nn.Module) -> dict[str, float]:
        """`JUDGED_METRICS` of each probe; none where chance drew no test image of another class."""
        assert self._test.labels is not None
        if (self._test.labels == self._target_class).all():
            return {}
        bank = extract(encoder, self._bank.images, self._bank.labels)
        clean, triggered = (extract(encoder, images).vectors for images in (self._test.images, self._triggered))
        row: dict[str, float] = {}
        for probe in PROBES:
            predict = fit_probe(probe, bank, self._bank.num_classes)
            hits = predict(triggered)
            metrics = backdoor_metrics(
                labels=self._test.labels,
                target_class=self._target_class,
                clean_predictions=predict(clean),
                triggered_predictions=hits,
                twin_triggered_predictions=hits,  # this encoder may be the twin; the lift is read by no one
                num_classes=self._bank.num_classes,
            )
            row |= {f"{probe}_{name}": value for name in JUDGED_METRICS if (value := metrics[name].value) is not None}
        return row


def _float(features: Tensor) -> Tensor:
    return features.float().cpu()
