"""Fine-pruning: silence what sleeps on clean images, then fine-tune (Liu et al., RAID 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from blto.data.views import RECIPES
from blto.defenses.base import Conditions, EncoderRepair, Images
from blto.defenses.clean_fine_tuning import CleanFineTuning
from blto.defenses.evidence import Evidence
from blto.errors import InputRefused
from blto.evaluation.features import extract
from blto.models.encoder import Encoder
from blto.pretraining import METHODS
from blto.pretraining.spec import ViewsField, component
from blto.registry import Card

NEIGHBOURS, QUERIES, STEP = 10, 500, 0.01
"""Of an image that are compared; images whose neighbours are; share of the channels by which pruning goes on."""
PROBED = 16
"""Images by which the layers are found."""


def output_norms(encoder: Encoder, images: Images) -> list[str]:
    """Names of the batch norms whose channels add up to the features: without channel c of each, feature c is 0.

    Found by trying, with every other channel. In a residual net they are the last of every block of the last stage, and
    its shortcut's; of two in a row, either of which would do, it is the later.

    Args:
        encoder: in evaluation mode; left as it is.
        images: uint8 (N, 3, S, S) to try on.

    Raises:
        InputRefused: silencing a channel of all candidates does not silence its feature.
    """
    probe = deepcopy(encoder)
    own = {
        name: (part, part.weight.detach().clone(), part.bias.detach().clone())
        for name, part in probe.backbone.named_modules()
        if isinstance(part, nn.BatchNorm2d) and part.affine and part.num_features == encoder.feature_dim
    }
    tried = torch.arange(0, encoder.feature_dim, 2)
    silence(probe, list(own), tried)
    if not own or extract(probe, images).vectors[:, tried].any():
        raise InputRefused(
            f"the encoder's {encoder.feature_dim} features are not the channels of its last batch norms, so "
            "fine-pruning cannot silence one; use clean_fine_tuning, or a backbone like resnet18."
        )
    needed = []
    for name, (part, weight, bias) in own.items():
        with torch.no_grad():
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        if extract(probe, images).vectors[:, tried].any():
            silence(probe, [name], tried)
            needed.append(name)
    return needed


@torch.no_grad()
def silence(encoder: Encoder, norms: Sequence[str], channels: Tensor) -> None:
    """Set scale and shift of some channels of batch norms of the backbone to 0, in place."""
    for name in norms:
        norm = cast(nn.BatchNorm2d, encoder.backbone.get_submodule(name))
        for values in (norm.weight, norm.bias):
            values[channels.to(values.device)] = 0


def neighbours(features: Tensor) -> Tensor:
    """Rows of the nearest others by cosine, int64 (Q, k), of rows evenly spread over features (N, D)."""
    unit, rows = F.normalize(features), torch.arange(0, len(features), max(1, len(features) // QUERIES))
    similar = unit[rows] @ unit.T
    similar[torch.arange(len(rows)), rows] = -torch.inf
    return similar.topk(min(NEIGHBOURS, len(features) - 1)).indices


def share_kept(before: Tensor, after: Tensor) -> float:
    """The share of the neighbours (Q, k) that are still among them."""
    return float((before[:, :, None] == after[:, None, :]).any(dim=2).float().mean())


def dormant(features: Tensor, *, share: float | None, keep: float) -> Tensor:
    """The least active channels, int64, that are to be pruned.

    Args:
        features: (N, D) of clean images; a channel's activity is its mean.
        share: of the D channels; None goes on, in steps of one in a hundred, as long as `keep` holds.
        keep: share of the images' nearest neighbours that have to stay.
    """
    order = features.mean(dim=0).argsort(stable=True)
    if share is not None:
        return order[: round(share * len(order))]
    before, left, count = neighbours(features), features.clone(), 0
    step = max(1, round(STEP * len(order)))
    for end in range(step, len(order), step):
        left[:, order[:end]] = 0
        if share_kept(before, neighbours(left)) < keep:
            break
        count = end
    return order[:count]


class FinePruning(EncoderRepair):
    """Silence the features that are least active on clean images, then fine-tune on those images.

    Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID
    2018, arXiv 1805.12185. A backdoor may live in units that clean images leave asleep. The channels of the last
    convolutional stage are pruned in the order of their mean activation on clean images, until the quality drops; the
    fine-tuning undoes what a backdoor keeps in the others. The last stage's channels are the features, so a pruned one
    is 0 for every image. Behind a ReLU, which lets no gradient through at 0, it stays so in the fine-tuning.

    Where this differs from the paper: without labels there is no accuracy to watch; pruning ends where less than `keep`
    of the clean images' ten nearest neighbours are still among them. The fine-tuning is `clean_fine_tuning`, with a
    self-supervised loss. Channels are zeroed in their batch norms, not cut out.

    Args:
        images: clean images, to measure activity on and to train on.
        share: of the channels that is pruned; null is as many as `keep` allows; 0 prunes none.
        keep: share of nearest neighbours that pruning has to keep.
        method, views, epochs, batch_size, lr: of the fine-tuning; 0 epochs leave it out.
    """

    card = Card(
        "fine-pruning",
        "silence the features that sleep on clean images, then fine-tune on them",
        "arXiv 1805.12185",
        2018,
        "the encoder and clean images without labels",
    )
    evidence = Evidence(
        "With 1 to 10% of the clean images the ASR of one patch victim falls from 98% to 11-16% and of one BadEncoder "
        "from 98% to 4-8%, for two to three points of accuracy; BLTO's stays.",
        must_show="test_fine_pruning::test_zero_share_is_the_fine_tuning_and_without_it_nothing",
        positive="test_fine_pruning::test_a_backdoor_that_sleeps_on_clean_images_is_silenced",
    )

    def __init__(
        self,
        *,
        images: Annotated[int, Field(ge=2)] = 5000,
        share: Annotated[float, Field(ge=0, lt=1)] | None = None,
        keep: Annotated[float, Field(gt=0, le=1)] = 0.9,
        method: component(METHODS) = "simclr",  # type: ignore[valid-type]  # made from the registry
        views: ViewsField = RECIPES["simsiam_cifar"],
        epochs: Annotated[int, Field(ge=0, le=100_000)] = 10,
        batch_size: Annotated[int, Field(ge=2, le=65_536)] = 128,
        lr: Annotated[float, Field(gt=0)] = 0.2,
    ) -> None:
        self.images, self.share, self.keep = images, share, keep
        self.tuning = CleanFineTuning(
            images=images, method=method, views=views, epochs=epochs, batch_size=batch_size, lr=lr
        )

    def repair(self, encoder: Encoder, images: Images, conditions: Conditions) -> Encoder:
        """See `EncoderRepair.repair`. Says how many channels it pruned.

        Raises:
            InputRefused: a backbone whose features are not the channels of batch norms.
            Diverged: the loss becomes NaN or Inf.
        """
        channels = dormant(extract(encoder, images).vectors, share=self.share, keep=self.keep)
        conditions.progress.say(f"fine-pruning: {len(channels)} of {encoder.feature_dim} channels pruned")
        if not len(channels):
            return self.tuning.repair(encoder, images, conditions)
        norms = output_norms(encoder, images[:: max(1, len(images) // PROBED)])
        silence(encoder, norms, channels)
        repaired = self.tuning.repair(encoder, images, conditions)
        silence(repaired, norms, channels)  # where no ReLU has kept them so
        return repaired
