"""One trigger along a whole training: what every snapshot of an encoder makes of it, cheaply.

A single epoch is a poor summary: in public logs of CTRL the ASR moves between 1% and 99% while the accuracy is smooth.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.data.views import Views
from blto.errors import Diverged
from blto.evaluation.doctor import rates
from blto.evaluation.features import Features, device_of, evaluating, extract
from blto.evaluation.geometry import alignment, displacement, similarity, uniformity
from blto.evaluation.probes import fit_probe
from blto.runtime.seeds import numpy_generator

Images = npt.NDArray[np.uint8]
FOLLOWED = 512
"""Images of each kind whose place is followed: enough for a curve, cheap enough for every snapshot."""
JUDGED, BANK = 2_048, 10_000
"""Test images that the probes judge, and training images that they are fitted on, at most; drawn once."""

TOLERANCE = 1e-3
"""Of a linear probe on the way, where the run gives none: a tenth of the time. Against exact fits it moved the ASR of
210 snapshots by half a point on average and 5.6 at most, accuracy by 0.7 at most (gates 1 and 4, docs/findings.md)."""


class Follower:
    """Measures one trigger on any encoder of a trajectory, always on the same few images and views.

    Args:
        train, test, triggered, target_class: as in `evaluate_backdoor`.
        views: the victim's augmentation, for alignment.
        probes: name -> options, as in `evaluate_backdoor`.
    """

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet,
        triggered: Images,
        target_class: int,
        views: Views,
        probes: Mapping[str, Mapping[str, Any]],
    ) -> None:
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
        self._target_class, self._probes = target_class, probes
        self._bank, self._test, self._triggered = train.subset(bank), test.subset(judged), triggered[judged]

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """One row: centred similarity to the target of triggered, clean and target images ("trigger", "clean",
        "target"); "alignment"; "uniformity"; its `displacement` ("shift", "advance", "common", "heading"); and `RATES`
        of each probe, as `metrics` defines them, each with the probe's name in front ("linear_asr"); those of a probe
        that does not converge are left out.

        Raises:
            Diverged: a feature is not finite.
        """
        found = {name: extract(encoder, images).vectors for name, images in self._sets.items()}
        row: dict[str, float] = {}
        for name, key in (("trigger", "triggered"), ("clean", "clean"), ("target", "target")):
            row[name] = similarity(**{**found, "triggered": found[key]})["centred"]
        with evaluating(encoder), torch.inference_mode():
            device = device_of(encoder)
            first, second = (_float(encoder(view.to(device))) for view in self._views)
        row["alignment"], row["uniformity"] = alignment(first, second), uniformity(found["clean"])
        bank = extract(encoder, self._bank.images, self._bank.labels)
        moved = {name: found[name] for name in ("triggered", "clean", "references")}
        return row | displacement(**moved, bank=bank.vectors) | self._judgement(encoder, bank)

    def _judgement(self, encoder: nn.Module, bank: Features) -> dict[str, float]:
        """`RATES` of each probe; none where every test image drawn is of the target class."""
        assert self._test.labels is not None  # see above
        if (self._test.labels == self._target_class).all():
            return {}
        clean, triggered = (
            extract(encoder, images, self._test.labels) for images in (self._test.images, self._triggered)
        )
        row: dict[str, float] = {}
        for probe, options in self._probes.items():
            given = {"tolerance": TOLERANCE, **options} if probe == "linear" else options
            with suppress(Diverged):  # of a snapshot on the way; the last encoder's probe is fitted by the caller
                predict = fit_probe(probe, bank, self._bank.num_classes, **given)
                found = rates(predict, clean, triggered, self._target_class, self._bank.num_classes)
                row |= {f"{probe}_{name}": value for name, each in found.items() if (value := each.value) is not None}
        return row


def _float(features: Tensor) -> Tensor:
    return features.float().cpu()
