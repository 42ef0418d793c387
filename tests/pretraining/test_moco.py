"""MoCo against its formula, lightly's loss with a memory bank, and a queue of Python's."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor

from blto.files.safetensors import read_safetensors
from blto.models.encoder import build_encoder
from blto.models.native import resnet
from blto.models.native.library import find_kernels
from blto.pretraining.loop import pretrain
from blto.pretraining.methods import moco
from blto.pretraining.methods.moco import MoCo, enqueue, info_nce
from blto.pretraining.spec import OptimizerSpec
from blto.pretraining.trainer import Trainer
from tests.factories import TINY_BACKBONE, random_images, tiny_recipe

WORDS = find_kernels()[1]
DIM, QUEUE = 8, 20


def build(**changes: Any) -> MoCo:
    torch.manual_seed(0)
    encoder = build_encoder(TINY_BACKBONE, seed=0, image_size=16)
    return MoCo(encoder, **{"hidden_dim": 16, "output_dim": DIM, "queue_size": QUEUE, **changes})


def pair(seed: int, count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, 16, 16, generator=generator) for _ in range(2)]


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def oldest_first(queue: Tensor, pointer: Tensor) -> Tensor:
    return queue.roll(-int(pointer), dims=0)


def test_the_loss_of_one_query_by_hand() -> None:
    query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.8, -0.6]])
    by_hand = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(0.0) + math.exp(-2.0) + math.exp(1.6)))
    assert info_nce(query, key, negatives, 0.5).item() == pytest.approx(by_hand, abs=1e-6)


def test_the_loss_is_lightly_s_with_the_queue_as_its_memory_bank() -> None:
    queries, keys, negatives = unit(6, DIM, seed=0).requires_grad_(), unit(6, DIM, seed=1), unit(QUEUE, DIM, seed=2)
    bank = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM))
    bank.memory_bank.bank = negatives.clone()
    losses = info_nce(F.normalize(queries, dim=1), keys, negatives, 0.2), bank(queries, keys)  # which normalises too
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    found, wanted = (torch.autograd.grad(loss, queries)[0] for loss in losses)
    torch.testing.assert_close(found, wanted)


def test_the_method_compares_the_first_view_with_keys_of_the_second() -> None:
    method, views = build(), pair(1)
    found = method.losses(views)["loss"].item()
    with torch.no_grad():
        query = F.normalize(method.projector(method.encoder(views[0])), dim=1)
        key = F.normalize(method.momentum_projector(method.momentum_encoder(views[1])), dim=1)
    total = 0.0
    for q, k in zip(query, key, strict=True):
        own = math.exp(float(q @ k) / 0.2)
        total -= math.log(own / (own + sum(math.exp(float(q @ n) / 0.2) for n in method.queue)))
    assert found == pytest.approx(total / 6, abs=1e-5)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 1), (5, 5), (4, 4, 4, 4), (3, 7, 2), (12,), (1,) * 7])
def test_the_queue_holds_the_last_keys_first_in_first_out(sizes: tuple[int, ...]) -> None:
    """Five keys, in batches that do not divide it, that wrap around, and that are larger than it."""
    queue, pointer = torch.zeros(5, 1), torch.zeros((), dtype=torch.int64)
    expected, number = deque([0.0] * 5, maxlen=5), 1
    for size in sizes:
        keys = [float(number + i) for i in range(size)]
        enqueue(queue, pointer, torch.tensor(keys).unsqueeze(1))
        expected.extend(keys)
        number += size
        assert oldest_first(queue, pointer).flatten().tolist() == list(expected)


def test_no_positive_is_among_the_negatives_of_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    original = moco.info_nce

    def noting(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
        seen.append((keys.clone(), negatives.clone()))
        return original(queries, keys, negatives, temperature)

    monkeypatch.setattr(moco, "info_nce", noting)
    method = build()
    start = method.queue.clone()
    for step in range(5):  # 30 keys through a queue of 20
        method.losses(pair(step))
        method.after_step(0.1)
    assert torch.equal(seen[0][1], start)
    history = torch.cat([start, *(keys for keys, _ in seen)])
    for step, (keys, negatives) in enumerate(seen):
        assert not (keys.unsqueeze(1) == negatives).all(dim=2).any()
        before = history[6 * step : 6 * step + QUEUE]  # the last 20 keys of the steps before
        assert {tuple(row) for row in negatives.tolist()} == {tuple(row) for row in before.tolist()}
    torch.testing.assert_close(history.norm(dim=1), torch.ones(len(history)))


def test_the_momentum_branch_gets_no_gradient_and_is_the_exact_average() -> None:
    method = build(ema_momentum=0.75)
    method.losses(pair(1))["loss"].backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    pairs = ((method.encoder, method.momentum_encoder), (method.projector, method.momentum_projector))
    for online, average in pairs:
        assert all(p.grad is not None for p in online.parameters())
        assert not any(p.requires_grad or p.grad is not None for p in average.parameters())
        with torch.no_grad():
            for parameter in online.parameters():
                parameter.add_(1.0)
    before = [[p.clone() for p in average.parameters()] for _, average in pairs]
    for progress in (0.0, 1.0):  # the momentum is the same throughout
        method.after_step(progress)
    for old, (online, average) in zip(before, pairs, strict=True):
        expected = [0.75**2 * o + (1 - 0.75**2) * p for o, p in zip(old, online.parameters(), strict=True)]
        torch.testing.assert_close(list(average.parameters()), expected)


def test_queue_and_pointer_are_in_the_checkpoint(tmp_path: Path) -> None:
    images = random_images(36).without_labels()  # two epochs of four batches of 8: 64 keys
    pretrain(images, tiny_recipe("moco"), seed=0, folder=tmp_path)
    state, _ = read_safetensors(tmp_path / "checkpoint.safetensors")
    assert state["method.queue"].shape == (QUEUE, DIM)
    assert int(state["method.pointer"].item()) == 64 % QUEUE


@pytest.mark.skipif(WORDS != "AMX kernels", reason=WORDS)
def test_query_and_key_encoder_train_on_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    features = resnet.features

    def noting(*args: Any) -> Tensor:
        given.append(torch.is_grad_enabled())
        return features(*args)

    monkeypatch.setattr(resnet, "features", noting)
    losses = {}
    for precision in ("bf16", "fp32"):
        torch.manual_seed(0)
        method = MoCo(build_encoder({"name": "small_resnet", "width": 16}, seed=0, image_size=16), queue_size=50)
        run = Trainer(method, optimizer=OptimizerSpec(), total_steps=4, device="cpu", precision=precision)
        losses[precision] = float(run.train_step(pair(1, 32))["loss"])
    assert given == [True, False], "queries with a gradient, keys without"
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)
