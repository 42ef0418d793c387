"""Generator inversion: do triggers learned on clean encoders move a suspect unlike other clean encoders? (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from blto.defenses.base import Conditions, EncoderDetector, Images, Inspection
from blto.defenses.cluster_triggers import Search, common_clusters, invert_clusters, vectors_of
from blto.defenses.evidence import Evidence
from blto.models.encoder import Encoder
from blto.poisoning import GeneratorTrigger, apply_to_uint8
from blto.registry import Card

USUAL, WEIGHTS = "usual", "generator."
SHOWN = 8


class GeneratorInversion(EncoderDetector):
    """Learn a trigger for each cluster of images on clean encoders, and ask how far each of them moves the suspect.

    For each cluster of the clean images a generator within epsilon learns, through augmentation and on several clean
    encoders in turn, to move images of other clusters there (`cluster_triggers`). Of an encoder and a trigger the shift
    is the length of the mean displacement of the features, in units of the root mean square distance of clean features
    from their mean; r is its logarithm minus that of the clean encoders' mean. The score is the standard deviation of r
    over the clusters.

    Why: a backdoor changes what one class is made of for the encoder, and with it the answer to what moves images
    towards that class, up or down, and not to the triggers of other clusters. A search on the suspect itself, judged by
    the share of images that reach a cluster, hardly separated encoders: white-box triggers reach some cluster of every
    encoder. The same triggers for all encoders take that noise away.

    Ours; "generator inversion" after Neural Cleanse's inversion of masks (Wang et al., IEEE S&P 2019).

    Args:
        references: how many clean encoders it learns from.
        images: clean ones, on which triggers are learned and shifts are measured.
        clusters: of k-means over what the references make of the images.
        epsilon: L-infinity budget of the triggers, a fraction of the pixel range.
        steps: of Adam for each trigger.
        moved: on how many of the images shifts are measured.
    """

    card = Card(
        "Generator inversion",
        "triggers learned on clean encoders, and how far they move the suspect",
        threat_model="the encoder, clean encoders of its family, and clean images without labels",
    )
    evidence = Evidence(
        "With trucks as the target, on encoders that it was designed on, ten of ten patch, ten of ten BadEncoder and "
        "three of BLTO's ten encoders score above all of 35 clean ones; of ten BadEncoders with a class each five do, "
        "and neither a patch for airplanes nor BLTO for other classes.",
        must_show="test_generator_inversion::test_a_further_clean_encoder_is_told_from_a_tampered_one_and_no_other",
        positive="test_generator_inversion::test_a_planted_reaction_is_found_in_whatever_encoder_and_cluster_it_is",
    )

    def __init__(
        self,
        *,
        references: Annotated[int, Field(ge=1)] = 5,
        images: Annotated[int, Field(ge=100)] = 4000,
        clusters: Annotated[int, Field(ge=2, le=1000)] = 10,
        epsilon: Annotated[float, Field(gt=0, le=1)] = 8 / 255,
        steps: Annotated[int, Field(ge=1)] = 600,
        moved: Annotated[int, Field(ge=10)] = 400,
    ) -> None:
        self.references, self.images = references, images
        self.clusters, self.moved = clusters, min(moved, images)
        self.search = Search(epsilon=epsilon, width=16, steps=steps, batch_size=64, lr=4e-3)
        self.learning = {"images": images, "clusters": clusters, "moved": self.moved, "search": asdict(self.search)}

    def learn(self, references: Sequence[Encoder], images: Images, conditions: Conditions) -> dict[str, Tensor]:
        """The generators' weights, those of one name stacked, and the references' mean log-shift of each cluster."""
        features = [vectors_of(each, images, conditions) for each in references]
        clusters = common_clusters(features, self.clusters, conditions.seed)
        triggers = list(invert_clusters(references, features, images, clusters, self.search, conditions))
        states = [trigger.state_dict() for trigger in triggers]
        learned = {WEIGHTS + name: torch.stack([state[name] for state in states]) for name in states[0]}
        moved = self._triggered(triggers, images)
        shifts = [
            log_shifts(clean, [vectors_of(each, shown, conditions) for shown in moved])
            for each, clean in zip(references, features, strict=True)
        ]
        return {**learned, USUAL: torch.from_numpy(np.mean(shifts, axis=0))}

    def inspect(self, encoder: Encoder, images: Images, conditions: Conditions) -> Inspection:
        """See `EncoderDetector.inspect`. Measures: `level`, the mean of r over the clusters, and the `cluster` whose
        r lies furthest from their median, from 0.
        """
        learned = conditions.learned.tensors
        triggered = self._triggered(self._triggers(learned), images)
        seen = [vectors_of(encoder, each, conditions) for each in triggered]
        found = log_shifts(vectors_of(encoder, images, conditions), seen) - learned[USUAL].numpy()
        cluster = int(np.abs(found - np.median(found)).argmax())
        measures = {"level": float(found.mean()), "cluster": float(cluster)}
        pairs = {"plain": images[:SHOWN], "triggered": triggered[cluster][:SHOWN]}
        shown = {name: torch.from_numpy(each.copy()).float().div_(255) for name, each in pairs.items()}
        return Inspection(float(found.std()), None, measures, shown)

    def _triggers(self, learned: Mapping[str, Tensor]) -> list[GeneratorTrigger]:
        weights = {name.removeprefix(WEIGHTS): value for name, value in learned.items() if name.startswith(WEIGHTS)}
        triggers = []
        for cluster in range(self.clusters):
            trigger = self.search.fresh(0)
            trigger.load_state_dict({name: value[cluster] for name, value in weights.items()})
            triggers.append(trigger.eval())
        return triggers

    def _triggered(self, triggers: Sequence[GeneratorTrigger], images: Images) -> list[Images]:
        return [apply_to_uint8(trigger, images[: self.moved]) for trigger in triggers]


def log_shifts(clean: Tensor, triggered: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    """The logarithm of each trigger's shift.

    Args:
        clean: features (N, D) of clean images.
        triggered: of each trigger, features (M, D) of the first M of them with it, M at most N.
    """
    clean = clean.double()
    typical = (clean - clean.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    tiny = torch.finfo(torch.float32).tiny
    ways = [(each.double() - clean[: len(each)]).mean(dim=0).norm() for each in triggered]
    return torch.stack([way / typical.clamp_min(tiny) for way in ways]).clamp_min(tiny).log().numpy()
