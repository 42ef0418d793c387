"""The strongest channel: its arithmetic, a planted one, and that it needs nothing but the encoder."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.bank import RESULTS, bank
from blto.defenses import DEFENSES
from blto.defenses.base import Conditions, EncoderDetector, Inspection, inspect_encoder
from blto.defenses.channel_outlier import ChannelOutlier
from blto.errors import InputRefused
from blto.models.checkpoints import load_encoder
from blto.models.encoder import Encoder, build_encoder

WIDTH = 32
LIMIT = (WIDTH - 1) / WIDTH**0.5


def encoder(seed: int = 0) -> Encoder:
    return build_encoder({"name": "small_resnet", "width": WIDTH}, seed=seed, image_size=16)


def inspect(suspect: Encoder) -> Inspection:
    return inspect_encoder(ChannelOutlier(), suspect, None, Conditions())


def test_the_score_is_the_furthest_channel_of_all_layers() -> None:
    found = inspect(encoder())
    assert set(found.measures) >= {"stem.1", "stages.0.bn1", "stages.0.bn2"}
    assert found.score == max(found.measures.values())
    assert found.flagged is None
    convolution, norm = (encoder().backbone.get_submodule(f"stem.{place}") for place in (0, 1))
    assert isinstance(convolution, torch.nn.Conv2d)
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert norm.running_var is not None
    bounds = torch.linalg.svdvals(convolution.weight.flatten(2).double())[:, 0] * norm.weight.abs()
    bounds = (bounds / (norm.running_var + norm.eps).sqrt()).detach()
    assert found.measures["stem.1"] == pytest.approx(float((bounds.max() - bounds.mean()) / bounds.std()), rel=1e-6)


def test_a_planted_channel_stands_out_and_in_its_layer_alone() -> None:
    clean, planted = encoder(), encoder()
    with torch.no_grad():
        planted.backbone.get_parameter("stages.0.bn2.weight")[5] *= 50
    before, after = inspect(clean), inspect(planted)
    assert after.measures["stages.0.bn2"] > 0.9 * LIMIT
    assert after.score > before.score + 1
    others = before.measures.keys() - {"stages.0.bn2"}
    assert all(after.measures[name] == before.measures[name] for name in others)


def test_equal_channels_do_not_stand_out() -> None:
    flat = encoder()
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.fill_(0.5)
    assert inspect(flat).score == pytest.approx(0, abs=1e-6)


def test_the_encoder_is_left_as_it_was_and_no_image_is_needed() -> None:
    suspect = encoder()
    state = copy.deepcopy(suspect.state_dict())
    assert inspect(suspect).measures == inspect(suspect).measures
    assert all(torch.equal(value, suspect.state_dict()[name]) for name, value in state.items())
    assert ChannelOutlier().images == 0
    detector = DEFENSES.build("channel_outlier")
    assert isinstance(detector, EncoderDetector)


def test_a_backbone_without_batch_norm_is_refused() -> None:
    bare = Encoder(torch.nn.Conv2d(3, 4, 3), image_size=16)
    with pytest.raises(InputRefused, match="no 2-D batch norm"):
        inspect(bare)


def test_encoders_taught_a_patch_by_their_training_images_stand_out_of_clean_ones() -> None:
    """The committed bank: 40 clean encoders, and ten whose training images carried a patch of 12 pixels."""
    scores: dict[str, list[float]] = {"clean": [], "patch": []}
    for banked in bank(RESULTS):
        if banked.group in scores:
            scores[banked.group].append(inspect(load_encoder(banked.file)).score)
    assert [len(each) for each in scores.values()] == [40, 10]
    area = roc_auc_score([0] * 40 + [1] * 10, scores["clean"] + scores["patch"])
    assert area > 0.95
    assert sum(score > max(scores["clean"]) for score in scores["patch"]) >= 8
