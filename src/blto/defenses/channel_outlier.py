"""The strongest channel: how far does one channel's Lipschitz bound stand out of its layer? Ours, after CLP."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from blto.defenses.base import Conditions, EncoderDetector, Images, Inspection
from blto.defenses.clp import channel_bounds, pair
from blto.defenses.evidence import Evidence
from blto.errors import InputRefused
from blto.models.encoder import Encoder
from blto.registry import Card


class ChannelOutlier(EncoderDetector):
    """Score an encoder by the channel that stands furthest out of its layer; needs no image and draws nothing.

    CLP (Zheng et al., ECCV 2022) prunes channels whose Lipschitz bound lies more than 3 standard deviations above the
    mean of their layer. Clean encoders have such channels too, so their number says little; but on the encoders here a
    patch that the training images carried leaves one or a few that stand out about twice as far. The score is the
    largest (bound - mean) / sd over all channels of all layers. At most (C - 1) / sqrt(C) is possible in a layer of C,
    so only encoders of one architecture can be compared, and it has no threshold of its own.
    """

    card = Card(
        "Strongest channel",
        "how far the channel that reacts most strongly stands out of its layer",
        threat_model="the encoder alone",
    )
    evidence = Evidence(
        "It tells twelve of twelve encoders whose training images carried a patch from clean ones, two of them with "
        "another pattern and one with another class; of BadEncoder's and BLTO's none.",
        must_show="test_channel_outlier::test_a_planted_channel_stands_out_and_in_its_layer_alone",
        positive="test_channel_outlier::test_encoders_taught_a_patch_by_their_training_images_stand_out_of_clean_ones",
    )

    def reason_against(self, encoder: Encoder) -> str | None:
        """It has no batch norm, or one that follows no convolution."""
        try:
            pair(encoder.backbone)
        except InputRefused as error:
            return str(error).partition(",")[0]
        return None

    @torch.no_grad()
    def inspect(self, encoder: Encoder, images: Images, conditions: Conditions) -> Inspection:
        """See `EncoderDetector.inspect`. Measures: the largest of each layer, by the name of its batch norm.

        Raises:
            InputRefused: a backbone in which no batch norm, or not every one, follows a convolution.
        """
        furthest = {}
        for name, convolution in pair(encoder.backbone).items():
            norm = cast(nn.BatchNorm2d, encoder.backbone.get_submodule(name))
            bounds = channel_bounds(cast(nn.Conv2d, encoder.backbone.get_submodule(convolution)), norm)
            spread = bounds.std() if len(bounds) > 1 else torch.zeros(())
            furthest[name] = float((bounds.max() - bounds.mean()) / spread) if spread > 0 else 0.0
        return Inspection(max(furthest.values()), None, furthest)
