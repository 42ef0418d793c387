"""i-CutMix by hand: the box, the mixed images, the N-pair loss, and what a step mixes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blto.errors import ConfigError
from blto.pretraining import METHODS, mixing
from blto.pretraining.loop import build_method
from blto.pretraining.mixing import cutmix, draw_box, n_pair
from blto.pretraining.spec import OptimizerSpec
from blto.pretraining.trainer import Trainer
from tests.factories import tiny_recipe

SEED = 5


def build(name: str, i_cutmix: float = 1.0) -> Any:
    return build_method(tiny_recipe(name, i_cutmix=i_cutmix), seed=0, image_size=16)


def pair(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(count, 3, 16, 16, generator=generator) for _ in range(2)]


def by_hand(queries: Tensor, keys: Tensor, share: float, temperature: float) -> float:
    total, size = 0.0, len(queries)
    for row, query in enumerate(queries.tolist()):
        logits = [sum(a * b for a, b in zip(query, key, strict=True)) / temperature for key in keys.tolist()]
        everything = math.log(sum(map(math.exp, logits)))
        total += share * (everything - logits[row]) + (1 - share) * (everything - logits[(row + 1) % size])
    return total / size


def test_boxes_lie_within_the_image_and_take_at_most_half_of_it() -> None:
    boxes = np.array([draw_box(1.0, 24, 40, seed=SEED, step=step) for step in range(2000)])
    top, bottom, left, right = boxes.T
    assert (top >= 0).all()
    assert (top <= bottom).all()
    assert (bottom <= 24).all()
    assert (left >= 0).all()
    assert (left <= right).all()
    assert (right <= 40).all()
    taken = (bottom - top) * (right - left) / (24 * 40)
    assert taken.max() <= 0.5
    assert 0.1 < taken.mean() < 0.2, "a quarter at alpha 1, less what is cut off at the border"
    inside = (top > 0) & (bottom < 24) & (left > 0) & (right < 40)
    shape = (right - left)[inside & (taken > 0.1)] / (bottom - top)[inside & (taken > 0.1)]
    assert abs(np.median(shape) - 40 / 24) < 0.1, "the image's shape"
    assert abs(((top + bottom) / 2)[inside].mean() - 12) < 0.5
    sharp, even = ([draw_box(alpha, 32, 32, seed=SEED, step=step) for step in range(300)] for alpha in (0.1, 50.0))
    sizes = [np.mean([(b[1] - b[0]) * (b[3] - b[2]) for b in drawn]) for drawn in (sharp, even)]
    assert sizes[0] < 0.5 * sizes[1], "a larger alpha mixes more evenly"


def test_a_box_is_a_function_of_seed_and_step() -> None:
    drawn = [draw_box(1.0, 32, 32, seed=SEED, step=step) for step in range(30)]
    assert [draw_box(1.0, 32, 32, seed=SEED, step=step) for step in range(30)] == drawn
    assert len(set(drawn)) > 20
    assert [draw_box(1.0, 32, 32, seed=SEED + 1, step=step) for step in range(30)] != drawn


def test_a_mixed_image_has_its_share_and_a_box_of_the_next_one() -> None:
    images = torch.arange(1.0, 6)[:, None, None, None].expand(5, 3, 16, 12)
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    for step in range(20):
        mixed, share = cutmix(images, 1.0, seed=SEED, step=step)
        assert torch.equal(images, before)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        top, bottom, left, right = draw_box(1.0, 16, 12, seed=SEED, step=step)
        for row in range(5):
            wanted = torch.full((3, 16, 12), row + 1.0)
            wanted[:, top:bottom, left:right] = (row + 1) % 5 + 1.0
            assert torch.equal(mixed[row], wanted)
            assert (mixed[row] == row + 1.0).float().mean().item() == pytest.approx(share.item())


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5])
def test_the_loss_by_hand(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (F.normalize(torch.randn(count, 8, generator=generator), dim=1) for count in (4, 7))
    for given in (keys[:4], keys):  # without and with further negatives
        found = n_pair(queries, given, torch.tensor(share), 0.2).item()
        assert found == pytest.approx(by_hand(queries, given, share, 0.2), abs=1e-4)


def test_a_mixed_image_is_best_placed_between_the_two_that_it_is_of() -> None:
    keys = torch.eye(4)
    angle, share = torch.tensor(0.3, requires_grad=True), torch.tensor(0.7)
    for _ in range(200):
        queries = torch.cos(angle) * keys + torch.sin(angle) * keys.roll(-1, 0)
        (gradient,) = torch.autograd.grad(n_pair(queries, keys, share, 0.5), angle)
        angle = (angle - 0.5 * gradient).detach().requires_grad_()
    assert 0.1 < angle.item() < math.pi / 4, "nearer to the one of which there is more"


def test_simclr_compares_mixed_first_views_with_second_ones() -> None:
    method, views = build("simclr"), pair()
    found = method.mixed_losses(views, torch.tensor(0.6))["loss"].item()
    with torch.no_grad():
        queries, keys = F.normalize(method.project(method.encoder(torch.cat(views))), dim=1).chunk(2)
    assert found == pytest.approx(by_hand(queries, keys, 0.6, 0.5), abs=1e-4)


def test_moco_has_the_batch_s_keys_and_the_queue_to_tell_apart() -> None:
    method, views = build("moco"), pair()
    queue = method.get_buffer("queue").clone()
    found = method.mixed_losses(views, torch.tensor(0.6))["loss"].item()
    with torch.no_grad():
        queries = F.normalize(method.project(method.encoder(views[0])), dim=1)
        keys = F.normalize(method.momentum_projector(method.momentum_encoder(views[1])), dim=1)
    assert found == pytest.approx(by_hand(queries, torch.cat((keys, queue)), 0.6, 0.2), abs=1e-4)
    method.after_step(0.5)
    assert torch.allclose(method.get_buffer("queue")[:6], keys), "the keys go into the queue as ever"


@pytest.mark.parametrize("name", ["moco", "simclr"])
def test_a_step_mixes_its_first_view_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[Tensor], Tensor]] = []
    method, views = build(name), pair()
    before, original = [view.clone() for view in views], method.mixed_losses

    def noting(given: list[Tensor], share: Tensor) -> dict[str, Tensor]:
        seen.append((given, share))
        losses: dict[str, Tensor] = original(given, share)
        return losses

    monkeypatch.setattr(method, "mixed_losses", noting)
    run = Trainer(method, optimizer=OptimizerSpec(), total_steps=4, seed=SEED, device="cpu", precision="fp32")
    for step in range(3):
        run.train_step(views)
        mixed, share = cutmix(views[0], 1.0, seed=SEED, step=step)
        assert torch.equal(seen[step][0][0], mixed)
        assert torch.equal(seen[step][0][1], views[1])
        assert torch.equal(seen[step][1], share)
    assert all(torch.equal(view, kept) for view, kept in zip(views, before, strict=True))


def test_without_the_option_nothing_is_drawn_or_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "draw_box", None)
    for name in METHODS.names():
        run = Trainer(build(name, 0.0), optimizer=OptimizerSpec(), total_steps=4, device="cpu", precision="fp32")
        run.train_step(pair())


def test_the_option_leaves_what_is_stored_as_it_was() -> None:
    assert "i_cutmix" not in METHODS.resolve("simclr")
    assert "i_cutmix" not in METHODS.resolve({"name": "moco", "i_cutmix": 0})
    assert METHODS.resolve({"name": "moco", "i_cutmix": 1})["i_cutmix"] == 1.0
    with pytest.raises(ConfigError, match=r"method\.i_cutmix: input should be greater than or equal to 0"):
        METHODS.resolve({"name": "simclr", "i_cutmix": -1})
    with pytest.raises(ConfigError, match="unknown key"):
        METHODS.resolve({"name": "byol", "i_cutmix": 1})
