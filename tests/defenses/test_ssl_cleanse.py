"""SSL-Cleanse: its index, its weights, that a planted patch is found where it is, and that a clean encoder is not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.defenses.base import Conditions, Inspection, inspect_encoder
from blto.defenses.ssl_cleanse import FULL, THRESHOLD, SSLCleanse, Weights, _Clusters, anomaly_index
from blto.errors import Diverged, InputRefused
from blto.models.encoder import Encoder, build_encoder

SIZE, CORNER, GROUPS, COUNT, TARGET = 16, 4, 6, 72, 2
_signs = np.random.default_rng(0).choice([-1, 1], (GROUPS, 3, SIZE, SIZE))
_noise = np.random.default_rng(1).normal(0, 8, (COUNT, 3, SIZE, SIZE))
GROUP = np.arange(COUNT, dtype=np.int64) % GROUPS
PIXELS = (128 + 30 * _signs[GROUP] + _noise).clip(0, 255).astype(np.uint8)
IMAGES = ImageSet(PIXELS, GROUP, tuple(f"group {number}" for number in range(GROUPS)), "groups")


class Templates(nn.Module):
    """How alike the pixels are to each group's; with `planted`, a bright corner looks like group `TARGET`."""

    def __init__(self, planted: bool) -> None:
        super().__init__()
        strength = torch.linspace(0.8, 1.2, GROUPS)[:, None] / 150  # some groups are easier to look like than others
        self.weight = nn.Parameter(strength * torch.from_numpy(_signs.reshape(GROUPS, -1)).float())
        self.planted = planted

    def forward(self, x: Tensor) -> Tensor:
        alike = F.linear(x.flatten(1), self.weight)
        if not self.planted:
            return alike
        corner = x[:, :, -CORNER:, -CORNER:].mean(dim=(1, 2, 3))
        return alike + torch.exp(3 * (corner - 1.2))[:, None] * F.one_hot(torch.tensor(TARGET), GROUPS)


def toy(planted: bool) -> Encoder:
    return Encoder(Templates(planted), image_size=SIZE).eval()


def inspect(encoder: Encoder, seed: int = 0, **options: object) -> Inspection:
    detector = SSLCleanse(images=COUNT, classes=GROUPS, **{"batch_size": 16, "epochs": 40, **options})  # type: ignore[arg-type]
    return inspect_encoder(detector, encoder, IMAGES, Conditions(seed))


def test_the_index_is_the_distance_to_the_median_in_standard_deviations() -> None:
    sizes = np.array([0.1, 0.5, 0.6, 0.4, 0.55])
    assert anomaly_index(sizes, 0.001) == pytest.approx((0.5 - 0.1) / (1.4826 * 0.1))
    assert anomaly_index(sizes, 0.001, as_released=True) == pytest.approx((0.5 - 0.1) * 0.6745 / (1.4826 * 0.1))
    normal = np.random.default_rng(0).normal(0.5, 0.05, 100_001)
    assert anomaly_index(normal, 0) == pytest.approx((0.5 - normal.min()) / 0.05, rel=0.01)
    assert anomaly_index(3 * sizes, 0) == pytest.approx(anomaly_index(sizes, 0)), "scale does not matter"


def test_only_a_small_mask_is_suspicious() -> None:
    assert anomaly_index(np.array([0.48, 0.5, 0.52, 0.49, 0.9]), 0.001) < 2
    assert anomaly_index(np.array([0.48, 0.5, 0.52, 0.49, 0.1]), 0.001) > 2


def test_two_deviations_of_so_few_sizes_are_no_rare_event() -> None:
    draw = np.random.default_rng(0)
    alarms = [anomaly_index(draw.normal(0.5, 0.05, 10), 0) > THRESHOLD for _ in range(1000)]
    assert 0.25 < np.mean(alarms) < 0.4, "as the page says"


def test_sizes_that_are_all_the_same_have_no_outlier() -> None:
    assert anomaly_index(np.full(10, FULL), 0.001) == 0
    assert anomaly_index(np.array([0.9, 1, 1, 1]), 0.01) == pytest.approx(10), "the least spread"


def test_weights_start_after_five_epochs_and_follow_each_cluster() -> None:
    weights = Weights(3, 0.1)
    always, never = np.array([True, False, True]), np.array([True, False, False])
    for _ in range(4):
        weights.after(always)
    assert weights.values.tolist() == [0, 0, 0]
    weights.after(always)
    assert weights.values.tolist() == [0.1, 0, 0.1]
    for _ in range(5):
        weights.after(never)
    assert weights.values == pytest.approx([0.15, 0, 0.1 / 1.5])
    for reached in (True, True, True, True, False, True, True, True, True):  # a run has to be unbroken
        weights.after(np.full(3, reached))
    assert weights.values == pytest.approx([0.15, 0, 0.1 / 1.5])
    weights.after(np.full(3, True))
    assert weights.values == pytest.approx([0.225, 0.1, 0.1])


def test_an_image_has_arrived_where_its_nearest_is_of_the_cluster() -> None:
    vectors = np.array([[1, 0], [2, 0.2], [0, 1], [0, 3]], np.float32)
    clusters = _Clusters(vectors, [np.array([0, 1]), np.array([2, 3])], torch.device("cpu"))
    found = F.normalize(torch.tensor([[[1.0, 0.3], [0.1, 1]], [[0.2, 1], [0, 1]]]), dim=2)
    assert clusters.arrived(found).tolist() == [0.5, 1]
    assert [others.tolist() for others in clusters.others] == [[2, 3], [0, 1]]
    assert torch.allclose(clusters.targets[1], torch.tensor([0.0, 1]))


def test_a_planted_patch_is_found_where_it_is_and_a_clean_encoder_is_not_flagged() -> None:
    planted, clean = inspect(toy(True)), inspect(toy(False))
    assert planted.flagged is True
    assert clean.flagged is False
    assert planted.score > 2 * clean.score
    assert planted.measures["reached"] == clean.measures["reached"] == GROUPS
    assert planted.measures["smallest"] < planted.measures["median"] / 2
    mask = planted.trigger["mask"][0] > 0.5
    corner = torch.zeros_like(mask)
    corner[-CORNER:, -CORNER:] = True
    assert (mask & corner).sum() / (mask | corner).sum() > 0.7, "intersection over union"
    assert planted.trigger["patch"][:, corner].mean() > 0.8
    stamped = torch.from_numpy(PIXELS).float() / 255
    stamped += planted.trigger["mask"] * (planted.trigger["patch"] - stamped)
    assert (toy(True)(stamped).argmax(dim=1) == TARGET).float().mean() > 0.95


def test_the_released_scale_is_an_option() -> None:
    usual, released = inspect(toy(True), epochs=12), inspect(toy(True), epochs=12, as_released=True)
    assert usual.score > 0
    assert released.score == pytest.approx(0.6745 * usual.score)
    assert released.measures == usual.measures


def test_the_product_with_the_patch_is_smaller_than_the_mask() -> None:
    mask, product = inspect(toy(False), epochs=3), inspect(toy(False), epochs=3, size="product")
    assert 0 < product.measures["median"] < 0.7 * mask.measures["median"]


def test_where_no_cluster_is_reached_nothing_is_flagged() -> None:
    found = inspect(toy(False), epochs=1, batch_size=8, success=1.0)
    assert (found.score, found.flagged, found.trigger) == (0.0, False, {})
    assert found.measures == {"smallest": FULL, "median": FULL, "reached": 0}


def test_all_images_of_an_epoch_may_have_to_arrive() -> None:
    assert inspect(toy(False), epochs=4, batch_size=8, success=1.0).measures["reached"] == GROUPS


def test_a_smaller_mask_that_served_is_kept_while_masks_grow() -> None:
    few, more = inspect(toy(False), epochs=3), inspect(toy(False), epochs=6)  # lambda is 0, and a full mask serves best
    assert few.measures["reached"] == GROUPS
    assert more.measures["smallest"] <= few.measures["smallest"]
    assert more.measures["median"] <= few.measures["median"]


def test_it_is_a_function_of_its_seed() -> None:
    first, again, other = (inspect(toy(True), seed, epochs=4) for seed in (3, 3, 4))
    assert (first.score, first.measures) == (again.score, again.measures)
    assert torch.equal(first.trigger["mask"], again.trigger["mask"])
    assert not torch.equal(first.trigger["mask"], other.trigger["mask"])


def test_the_encoder_and_the_images_are_left_as_they_were() -> None:
    encoder = build_encoder({"name": "small_resnet", "width": 16}, seed=0, image_size=SIZE).eval()
    before, pixels = copy.deepcopy(encoder.state_dict()), PIXELS.copy()
    inspect(encoder, epochs=2)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert not encoder.training
    assert not encoder.native
    assert np.array_equal(pixels, PIXELS)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputRefused, match="groups: 72 images, and the defense needs 256; give more"):
        inspect_encoder(SSLCleanse(), toy(False), IMAGES, Conditions())
    with pytest.raises(InputRefused, match="5 images for 10 pseudo-classes; lower the defense's option classes"):
        inspect_encoder(SSLCleanse(images=5), toy(False), IMAGES, Conditions())
    collapsed = toy(False)
    nn.init.zeros_(collapsed.backbone.weight)  # type: ignore[arg-type]
    with pytest.raises(Diverged, match="the encoder collapsed"):
        inspect(collapsed)


def test_its_defaults() -> None:
    detector = SSLCleanse()
    assert (detector.images, detector.classes, detector.epochs, detector.batch_size) == (256, 10, 60, 32)
    assert (detector.success, detector.first_lambda) == (0.99, 0.1)
    assert (detector.size, detector.as_released) == ("mask", False)
