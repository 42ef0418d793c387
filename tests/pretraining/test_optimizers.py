"""One optimisation step against its formula written out: optimisers, schedules, memory format, precision and engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from blto.models.encoder import Encoder, build_encoder
from blto.pretraining import METHODS, lars
from blto.pretraining.loop import pretrain
from blto.pretraining.method import SSLMethod
from blto.pretraining.methods.byol import BYOL
from blto.pretraining.spec import OptimizerSpec
from blto.pretraining.trainer import Trainer, build_optimizer
from blto.runtime import device
from tests.factories import TINY_BACKBONE, TINY_METHODS, random_images, tiny_recipe

SGD = OptimizerSpec(name="sgd", lr=0.1, momentum=0.8, weight_decay=0.02)
LARS = OptimizerSpec(name="lars", lr=2.0, momentum=0.8, weight_decay=0.02)
ADAMW = OptimizerSpec(name="adamw", lr=0.01, weight_decay=0.2)
TRUST = 0.001  # You et al., arXiv 1708.03888, section 5


def build(name: str = "simsiam") -> SSLMethod:
    torch.manual_seed(0)
    return METHODS.build(TINY_METHODS[name], build_encoder(TINY_BACKBONE, seed=0, image_size=16))


def trainer(optimizer: OptimizerSpec = SGD, *, method: str = "simsiam", total_steps: int = 4, **how: object) -> Trainer:
    how = {"precision": "fp32", **how}
    return Trainer(build(method), optimizer=optimizer, total_steps=total_steps, device="cpu", **how)  # type: ignore[arg-type]


@pytest.fixture
def views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(6, 3, 16, 16, generator=generator) for _ in range(2)]


def weights_and_gradients(method: SSLMethod, views: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, of a copy: nothing of the method moves."""
    copied = copy.deepcopy(method).train()
    copied.losses(views)["loss"].backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return {name: (p.detach(), p.grad) for name, p in copied.named_parameters() if p.grad is not None}


def decayed(method: SSLMethod) -> set[str]:
    """Names of the weights of convolutions and linear layers: all that may be decayed."""
    layers = (nn.Conv2d, nn.Linear)
    return {f"{name}.weight" for name, part in method.named_modules() if isinstance(part, layers)}


def moved(trainer: Trainer, before: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    after = {name: p.detach() for name, p in trainer.method.named_parameters()}
    return {name: after[name] - weight for name, (weight, _) in before.items()}


@pytest.mark.parametrize("optimizer", [SGD, LARS], ids=lambda spec: spec.name)
def test_three_steps_follow_the_formula(optimizer: OptimizerSpec, views: list[Tensor]) -> None:
    """v <- m v + s (g + wd w), w <- w - lr_k v; s is 1, or LARS's trust ratio; lr_k falls along half a cosine.

    Biases and norms: neither decayed nor scaled.
    """
    run = trainer(optimizer)
    velocity: dict[str, Tensor] = {}
    for step in range(3):
        before, with_decay = weights_and_gradients(run.method, views), decayed(run.method)
        run.train_step(views)
        rate = optimizer.lr * 0.5 * (1 + math.cos(math.pi * step / 4))
        for name, change in moved(run, before).items():
            weight, direction = before[name]
            if name in with_decay:
                ratio = TRUST * weight.norm() / (direction.norm() + optimizer.weight_decay * weight.norm())
                direction = direction + optimizer.weight_decay * weight
                direction = direction * ratio if optimizer.name == "lars" else direction
            velocity[name] = optimizer.momentum * velocity.get(name, torch.zeros(())) + direction
            torch.testing.assert_close(change, -rate * velocity[name], rtol=1e-3, atol=1e-6, msg=f"{name}, step {step}")


def test_lars_is_lightly_s_also_where_a_norm_is_zero() -> None:
    from lightly.utils.lars import LARS as LARS_OF_LIGHTLY

    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 3, 4, 5, generator=generator)
    start[1], gradients[:, 2] = 0, 0
    found = []
    for optimizer in (lars.LARS, LARS_OF_LIGHTLY):
        weights = [nn.Parameter(weight.clone()) for weight in start]
        run = optimizer([{"params": weights, "weight_decay": 0.02}], lr=2.0, momentum=0.8)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            run.step()
        found.append(torch.stack([weight.detach() for weight in weights]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_lars_adapts_also_where_nothing_is_decayed(views: list[Tensor]) -> None:
    run = trainer(LARS.model_copy(update={"weight_decay": 0.0}))
    before = weights_and_gradients(run.method, views)
    run.train_step(views)
    name = "encoder.backbone.stem.0.weight"
    weight, gradient = before[name]
    expected = -LARS.lr * TRUST * weight.norm() / gradient.norm() * gradient
    torch.testing.assert_close(moved(run, before)[name], expected, rtol=1e-3, atol=1e-6)


def test_the_first_step_of_adamw_is_the_sign_of_the_gradient_and_the_decay(views: list[Tensor]) -> None:
    run = trainer(ADAMW)
    before, with_decay = weights_and_gradients(run.method, views), decayed(run.method)
    run.train_step(views)
    for name, change in moved(run, before).items():
        weight, gradient = before[name]
        decay = ADAMW.lr * ADAMW.weight_decay * weight if name in with_decay else 0.0
        large = gradient.abs() > 1e-5  # beside it, Adam's 1e-8 is nothing
        torch.testing.assert_close(change[large], (-ADAMW.lr * gradient.sign() - decay)[large], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("optimizer", [SGD, LARS, ADAMW], ids=lambda spec: spec.name)
def test_norms_and_biases_are_not_decayed_and_no_weight_is_forgotten(name: str, optimizer: OptimizerSpec) -> None:
    method = build(name)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    groups = build_optimizer(optimizer, method).param_groups
    found = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    trainable = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    assert sorted(name for name, _ in found) == sorted(trainable)
    by_decay = {name for name, decay in found if decay == optimizer.weight_decay}
    assert by_decay == decayed(method) & set(trainable)
    assert all(decay == 0.0 for name, decay in found if name not in by_decay)


def test_pretraining_warms_up_and_then_follows_the_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = Trainer.train_step

    def noting(self: Trainer, views: list[Tensor]) -> dict[str, Tensor]:
        losses = original(self, views)
        rates.extend({group["lr"] for group in self.optimizer.param_groups})
        return losses

    monkeypatch.setattr(Trainer, "train_step", noting)
    images = random_images(32).without_labels()  # four steps an epoch
    pretrain(images, tiny_recipe(epochs=3, warmup_epochs=1, optimizer={"lr": 0.1}), seed=0)
    cosine = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, *cosine])


def test_byol_s_momentum_rises_to_1_over_the_training(views: list[Tensor]) -> None:
    """Grill et al., section 3.3: tau = 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2."""
    run = trainer(method="byol")
    method = run.method
    assert isinstance(method, BYOL)
    method.ema_momentum = 0.5
    pairs = ((method.encoder, method.momentum_encoder), (method.projector, method.momentum_projector))
    for step in (1, 2, 3, 4):
        before = [[p.clone() for p in average.parameters()] for _, average in pairs]
        run.train_step(views)
        tau = 1 - 0.5 * (math.cos(math.pi * step / 4) + 1) / 2
        for old, (online, average) in zip(before, pairs, strict=True):
            expected = [tau * o + (1 - tau) * p for o, p in zip(old, online.parameters(), strict=True)]
            torch.testing.assert_close(list(average.parameters()), expected)


def test_the_encoder_is_in_channels_last_memory() -> None:
    run = trainer(method="byol")
    convolutions = [part for part in run.method.encoder.modules() if isinstance(part, nn.Conv2d)]
    assert convolutions
    for part in convolutions:
        assert part.weight.is_contiguous(memory_format=torch.channels_last)
        if part.kernel_size != (1, 1):  # whose memory is the same in both formats
            assert not part.weight.is_contiguous()


def computed_in(run: Trainer, views: list[Tensor]) -> torch.dtype:
    """The type of the first convolution's activations in a training step."""
    seen: list[torch.dtype] = []
    convolution = next(part for part in run.method.encoder.modules() if isinstance(part, nn.Conv2d))
    convolution.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    run.train_step(views)
    (dtype,) = set(seen)
    return dtype


@pytest.fixture(params=[True, False], ids=["amx", "plain"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """A processor with, and one without, products in bf16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": request.param, "avx512_bf16": False})
    device.fabric.cache_clear()
    yield bool(request.param)
    device.fabric.cache_clear()


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_precision_that_was_asked_for_is_what_computes(
    precision: str, dtype: torch.dtype, engine: str, views: list[Tensor]
) -> None:
    run = trainer(precision=precision, engine=engine)
    assert computed_in(run, views) == dtype
    assert all(p.dtype == torch.float32 for p in run.method.parameters())


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_auto_is_bf16_where_the_processor_has_it_and_the_engine_is_fast(
    has_bf16: bool, engine: str, views: list[Tensor]
) -> None:
    run = trainer(precision="auto", engine=engine)
    bf16 = has_bf16 and engine == "fast"
    assert run.method.encoder.native == bf16
    assert computed_in(run, views) == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize(
    ("engine", "precision", "native"),
    [("fast", "bf16", True), ("fast", "fp32", False), ("reference", "bf16", False), ("reference", "fp32", False)],
)
@pytest.mark.parametrize("name", METHODS.names())
def test_the_engine_is_set_on_every_encoder(name: str, engine: str, precision: str, native: bool) -> None:
    run = trainer(method=name, engine=engine, precision=precision)
    encoders = [part for part in run.method.modules() if isinstance(part, Encoder)]
    assert [part.native for part in encoders] == [native] * (2 if name in {"byol", "moco"} else 1)


def test_pretraining_hands_on_precision_and_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[bool, Trainer]] = []
    original = Trainer.train_step

    def noting(self: Trainer, views: list[Tensor]) -> dict[str, Tensor]:
        trained.append((self.method.encoder.native, self))
        return original(self, views)

    monkeypatch.setattr(Trainer, "train_step", noting)
    for engine in ("fast", "reference"):
        recipe = tiny_recipe(epochs=1, batch_size=16, precision="bf16", engine=engine)
        found = pretrain(random_images(16).without_labels(), recipe, seed=0, device="cpu")
        assert not found.encoder.native  # whoever extracts features says in which precision
    assert [native for native, _ in trained] == [True, False]
    assert [run.fabric is device.fabric("cpu", "bf16") for _, run in trained] == [True, True]
