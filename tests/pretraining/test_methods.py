"""The methods against their papers' formulas: NT-Xent by hand and by lightly, SimSiam's and BYOL's stop-gradients."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor

from blto.models.encoder import build_encoder
from blto.pretraining import METHODS
from blto.pretraining.method import SSLMethod
from blto.pretraining.methods.byol import BYOL
from blto.pretraining.methods.simclr import SimCLR, nt_xent
from blto.pretraining.methods.simsiam import SimSiam
from tests.factories import TINY_BACKBONE, TINY_METHODS


def build(name: str) -> SSLMethod:
    torch.manual_seed(0)
    return METHODS.build(TINY_METHODS[name], build_encoder(TINY_BACKBONE, seed=0, image_size=16))


@pytest.fixture
def views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(6, 3, 16, 16, generator=generator) for _ in range(2)]


def nt_xent_by_hand(first: Tensor, second: Tensor, temperature: float) -> float:
    """Chen et al. 2020, equation 1, sample by sample."""
    z = [F.normalize(row, dim=0) for row in torch.cat((first, second))]
    n = len(first)
    total = 0.0
    for i in range(2 * n):
        pair = (i + n) % (2 * n)
        others = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[pair]) / temperature) / others)
    return total / (2 * n)


def test_simclr_loss_is_nt_xent_by_hand_and_by_lightly(views: list[Tensor]) -> None:
    method = build("simclr")
    assert isinstance(method, SimCLR)
    loss = method.losses(views)["loss"].item()
    with torch.no_grad():
        first, second = method.project(method.encoder(torch.cat(views))).chunk(2)
    assert loss == pytest.approx(nt_xent_by_hand(first, second, 0.5), abs=1e-5)
    assert loss == pytest.approx(float(NTXentLoss(temperature=0.5)(first, second)), abs=1e-6)
    pair = first.requires_grad_(), second.requires_grad_()
    found, wanted = (torch.autograd.grad(f(*pair), pair) for f in (partial(nt_xent, temperature=0.5), NTXentLoss()))
    torch.testing.assert_close(found, wanted)


def test_simsiam_loss_by_hand_and_no_gradient_through_the_target(views: list[Tensor]) -> None:
    method = build("simsiam")
    assert isinstance(method, SimSiam)
    losses = method.losses(views)
    copied = copy.deepcopy(method)
    z1, z2 = (copied.project(copied.encoder(view)) for view in views)
    p1, p2 = copied.predictor(z1), copied.predictor(z2)
    by_hand = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
    assert losses["loss"].item() == pytest.approx(by_hand.item(), abs=1e-5)
    with_stop = torch.autograd.grad(losses["loss"], next(method.projector.parameters()))[0]
    without_stop = torch.autograd.grad(by_hand, next(copied.projector.parameters()))[0]
    assert not torch.allclose(with_stop, without_stop, atol=1e-6)


def test_byol_momentum_branch_gets_no_gradient_and_follows(views: list[Tensor]) -> None:
    method = build("byol")
    assert isinstance(method, BYOL)
    method.losses(views)["loss"].backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert all(p.grad is None for p in method.momentum_encoder.parameters())
    assert all(p.grad is not None for p in method.encoder.parameters())
    before = [p.clone() for p in method.momentum_encoder.parameters()]
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(1.0)
    method.after_step(0.0)
    for old, new, online in zip(before, method.momentum_encoder.parameters(), method.encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.996 * old + 0.004 * online)
    frozen = [p.clone() for p in method.momentum_encoder.parameters()]
    method.after_step(1.0)  # the momentum has risen to 1
    torch.testing.assert_close(list(method.momentum_encoder.parameters()), frozen)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_learns_from_its_own_loss(name: str, views: list[Tensor]) -> None:
    method = build(name)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses: list[float] = []
    for step in range(30):
        if step == 4 and name == "moco":
            losses.clear()  # its first negatives are random directions, which no key resembles
        loss = method.losses(views)["loss"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        method.after_step((step + 1) / 30)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
