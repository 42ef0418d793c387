"""Is a trigger worth a victim? What it does to encoders that are there before any victim is, and the gates to pass.

Similarity is measured in the victim's own views, success on whole images; both also after what happens to images on
their way (JPEG, resizing). Sees encoders, images and triggered images; knows no attack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.data.views import Views
from blto.errors import ConfigError
from blto.evaluation.features import Features, device_of, evaluating, extract
from blto.evaluation.geometry import similarity
from blto.evaluation.metrics import backdoor_metrics
from blto.evaluation.probes import PROBES, Predict, fit_probe
from blto.files.images import decode_image, encode_jpeg
from blto.records import Metric

Images = npt.NDArray[np.uint8]
UNEDITED = "as they are"
JPEG_QUALITIES = (90, 75, 50)
ENOUGH = 0.8
"""The share of images that a trigger has to win on the surrogate, where its similarity does not do."""
RATES = ("asr", "untriggered_rate", "clean_accuracy")
_BATCH = 256


@dataclass(frozen=True)
class Reaction:
    """What an encoder makes of a trigger.

    Attributes:
        similarity: "triggered", "clean" (both of other classes) and "target" (its own images) -> the mean cosine of
            their views to the target class, after the mean of clean views was subtracted (`geometry.similarity`).
        metrics: probe -> the names of `RATES` -> Metric.
    """

    similarity: dict[str, float]
    metrics: dict[str, dict[str, Metric]]


def jpeg(images: Images, quality: int) -> Images:
    """Every image through a JPEG file, uint8 (N, 3, H, W); `quality` 1 to 95, colours at half the resolution."""
    files = (encode_jpeg(image.transpose(1, 2, 0), quality) for image in images)
    decoded = [decode_image(file, "a JPEG of our own").transpose(2, 0, 1) for file in files]
    return np.ascontiguousarray(np.stack(decoded))


def resized(images: Images, size: int) -> Images:
    """Every image, uint8 (N, 3, H, W), made `size` pixels wide and high and enlarged again; bilinear, antialiased."""
    there, back = (size, size), (images.shape[3], images.shape[2])
    edited = np.empty_like(images)
    for image, out in zip(images, edited, strict=True):
        small = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize(there, Image.Resampling.BILINEAR)
        out[:] = np.asarray(small.resize(back, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    return edited


def edits(image_size: int) -> dict[str, Callable[[Images], Images]]:
    """What may happen to an image, by name: nothing, JPEG, and three quarters of its size (24 of 32) and back."""
    size = max(1, 3 * image_size // 4)
    found: dict[str, Callable[[Images], Images]] = {UNEDITED: lambda images: images}
    found |= {f"JPEG {quality}": partial(jpeg, quality=quality) for quality in JPEG_QUALITIES}
    return {**found, f"resized to {size}": partial(resized, size=size)}


def reach(images: Images, triggered: Images) -> dict[str, float]:
    """How far a trigger moves a channel of a pixel, in 8-bit levels (of 255): "max" and "mean"."""
    change = np.maximum(images, triggered) - np.minimum(images, triggered)
    return {"max": float(change.max()), "mean": float(change.mean())}


def view_features(encoder: nn.Module, images: Images, views: Views) -> Tensor:
    """Features of one view of each image, float32 (N, D); image i has the same view in every call."""
    batches, device = [], device_of(encoder)
    with evaluating(encoder), torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            rows = np.arange(start, min(start + _BATCH, len(images)))
            drawn = views.draw(seed=0, epoch=0, samples=rows, view=0)
            batches.append(encoder(views.fast(images, rows, drawn).to(device)).float().cpu())
    return torch.cat(batches)


def react(
    encoder: nn.Module,
    *,
    bank: ImageSet,
    references: Images,
    measured: ImageSet,
    triggered: Images,
    target_class: int,
    views: Views,
    probes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Reaction]:
    """How an encoder reacts to a trigger, for each of `edits`.

    The edits are made on triggered, clean and target images; the probes and the frame in which similarities are
    measured are those of unedited ones.

    Args:
        encoder: one that never saw a poison, or the attacker's surrogate.
        bank: clean, labeled images that the probes are fitted on.
        references: uint8, images of the target class.
        measured: labeled images, none of them in `bank` or among `references`.
        triggered: uint8, every one of `measured` with the trigger, in the same order.
        target_class: the attack's.
        views: the victim's augmentation.
        probes: name -> options.

    Raises:
        ConfigError: unlabeled images, or none of the target class or of another one.
    """
    if bank.labels is None or measured.labels is None:
        raise ConfigError(f"{measured.name}: the check needs labeled images; give a data set with classes.")
    known = extract(encoder, bank.images, bank.labels)
    predictors = {name: fit_probe(name, known, bank.num_classes, **options) for name, options in probes.items()}
    own = measured.labels == target_class
    frame = {
        "clean": view_features(encoder, measured.images[~own], views),
        "target": view_features(encoder, measured.images[own], views),
        "references": view_features(encoder, references, views),
    }
    reactions = {}
    for name, edit in edits(measured.image_size).items():
        clean, changed = edit(measured.images), edit(triggered)
        sets = {"triggered": changed[~own], "clean": clean[~own], "target": clean[own]}
        seen = {key: view_features(encoder, images, views) for key, images in sets.items()}
        near = {key: similarity(**{**frame, "triggered": vectors})["centred"] for key, vectors in seen.items()}
        before, after = (extract(encoder, images, measured.labels) for images in (clean, changed))
        metrics = {
            probe: rates(each, before, after, target_class, bank.num_classes) for probe, each in predictors.items()
        }
        reactions[name] = Reaction(near, metrics)
    return reactions


def rates(
    predict: Predict, clean: Features, changed: Features, target_class: int, num_classes: int
) -> dict[str, Metric]:
    """`RATES` of one probe, from labeled features of the same images without and with the trigger."""
    assert clean.labels is not None  # `react` extracts them
    hits = predict(changed.vectors)
    found = backdoor_metrics(
        labels=clean.labels.numpy(),
        target_class=target_class,
        clean_predictions=predict(clean.vectors),
        triggered_predictions=hits,
        twin_triggered_predictions=hits,  # no victim here: the encoder is its own twin, and nothing of the twin is kept
        num_classes=num_classes,
    )
    return {name: found[name] for name in RATES}


def works(reaction: Reaction) -> bool:
    """Gate 2, on the surrogate: whether the trigger works at least where it was learned.

    Either it sends `ENOUGH` of the images to the target class (headline probe), more than go there without it; or its
    images are as near to the target class as that class's own, on an encoder that tells these from others at all.
    """
    metrics, near = reaction.metrics[PROBES[0]], reaction.similarity
    asr, without = (metrics[name].value or 0.0 for name in ("asr", "untriggered_rate"))
    return (asr >= ENOUGH and asr > without) or near["triggered"] >= near["target"] > near["clean"]
