"""What repairs that train have in common: the pretraining loop on the clean images that they are shown."""

from __future__ import annotations

from copy import deepcopy

from blto.data.images import ImageSet
from blto.defenses.base import Conditions, Images
from blto.errors import InputRefused
from blto.evaluation.features import device_of
from blto.models.encoder import Encoder
from blto.pretraining import METHODS
from blto.pretraining.loop import pretrain
from blto.pretraining.method import SSLMethod
from blto.pretraining.spec import PretrainingSpec
from blto.runtime.seeds import seeded, stream_seed


def train(method: SSLMethod, images: Images, spec: PretrainingSpec, conditions: Conditions, *, title: str) -> Encoder:
    """Train a method in place, and return its encoder where it lay before, in evaluation mode.

    Args:
        method: encoder and heads.
        images: uint8 (N, 3, S, S), N at least `spec.batch_size`.
        spec: views, schedule and optimiser; what it says of method and backbone does not matter.
        conditions: where, and from which seed.
        title: for the progress bar.
    """
    place = device_of(method.encoder)
    pretrain(
        ImageSet(images, None, (), "the clean images"),
        spec,
        seed=stream_seed(conditions.seed, "defense", "ssl_training"),
        device=conditions.device,
        observations=0,
        progress=conditions.progress,
        title=title,
        method=method,
    )
    return method.encoder.to(place)


def go_on_training(
    encoder: Encoder, images: Images, spec: PretrainingSpec, conditions: Conditions, *, title: str
) -> Encoder:
    """Train an encoder, in place, by the spec's method with fresh heads."""
    with seeded(stream_seed(conditions.seed, "defense", "heads")):
        method = METHODS.build(spec.method, encoder)
    return train(method, images, spec, conditions, title=title)


def fresh(encoder: Encoder, seed: int) -> Encoder:
    """An encoder of the same architecture and normalisation whose weights are drawn anew, each layer by its own rule.

    Raises:
        InputRefused: it holds a weight of which no layer can say how it is drawn, so that it would be the old one.
    """
    made, drawn = deepcopy(encoder), set[int]()
    with seeded(seed):
        for part in made.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
                drawn |= {id(value) for value in part.parameters(recurse=False)}
    left = [name for name, value in made.named_parameters() if id(value) not in drawn]
    if left:
        raise InputRefused(
            f"the encoder's weight {left[0]} belongs to no layer that can be drawn anew, so it cannot be trained from "
            "scratch; use clean_fine_tuning, or a backbone like resnet18."
        )
    return made
