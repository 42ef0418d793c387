"""A trigger never leaves its budget, and what it is can be told from its identity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from blto.errors import ConfigError
from blto.models import GENERATORS
from blto.poisoning import (
    AdditiveTrigger,
    Budget,
    FrequencyTrigger,
    GeneratorTrigger,
    IdentityTrigger,
    PatchTrigger,
    Trigger,
    project,
)
from blto.poisoning.trigger import Parametrisation

UNET = {"name": "unet", "width": 4}
unit = st.floats(0, 1, width=32)
anything = st.floats(-1e6, 1e6, width=32)
SHAPE = (2, 3, 4, 4)


class Constant(nn.Module):
    """A generator that answers one value everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        return torch.full_like(images, self.value)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(hnp.arrays(np.float32, SHAPE, elements=unit), hnp.arrays(np.float32, SHAPE, elements=anything), unit)
def test_projection_stays_within_epsilon_and_range(x: np.ndarray, y: np.ndarray, epsilon: float) -> None:
    images, candidate = torch.from_numpy(x), torch.from_numpy(y)
    out = project(images, candidate, epsilon)
    assert 0 <= out.min() <= out.max() <= 1
    assert (out.double() - images.double()).abs().max() <= epsilon + 1e-7
    assert torch.equal(project(images, out, epsilon), out)  # a projection leaves what is inside where it is


@settings(derandomize=True, deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, SHAPE, elements=unit), hnp.arrays(np.float32, SHAPE, elements=unit), unit)
def test_projection_is_the_nearest_allowed_image(x: np.ndarray, y: np.ndarray, epsilon: float) -> None:
    low, high = np.maximum(x - np.float32(epsilon), 0), np.minimum(x + np.float32(epsilon), 1)
    out = project(torch.from_numpy(x), torch.from_numpy(y), epsilon).numpy()
    np.testing.assert_allclose(out, np.clip(y, low, high), atol=1e-7)


def test_projection_passes_gradient_inside_the_budget_only() -> None:
    images = torch.tensor([0.5, 0.5, 0.5, 0.99])
    candidate = torch.tensor([0.5, 0.55, 0.7, 1.05], requires_grad=True)  # inside twice, outside, out of range
    (gradient,) = torch.autograd.grad(project(images, candidate, 0.1).sum(), candidate)
    assert gradient.tolist() == [1, 1, 0, 0]
    images.requires_grad_()
    (through_bounds,) = torch.autograd.grad(project(images, candidate, 0.1).sum(), images)
    assert through_bounds.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("epsilon", [-0.01, 1.01, float("nan"), float("inf")])
def test_budget_refuses_what_is_not_a_fraction(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="fraction of the pixel range"):
        Budget(epsilon)


def test_budget_refuses_another_norm() -> None:
    with pytest.raises(ConfigError, match="linf"):
        Budget(0.1, norm="l2")  # type: ignore[arg-type]  # what a configuration may hold


def test_levels_round_down_but_allow_for_decimals() -> None:
    assert [Budget(k / 255).levels for k in range(256)] == list(range(256))
    assert [Budget(float(f"{k / 255:.7f}")).levels for k in range(256)] == list(range(256))
    assert Budget(8.99 / 255).levels == 8
    assert Budget(0.0).levels == 0


def test_a_budget_of_the_whole_range_declares_none() -> None:
    assert (Budget(8 / 255).declared, Budget(0).declared, Budget(1).declared) == (8 / 255, 0.0, None)


def test_a_trigger_is_the_same_on_test_images_unless_its_attack_says_otherwise() -> None:
    for trigger in (IdentityTrigger(), _generator(), AdditiveTrigger(torch.ones(3, 4, 4), Budget(0.1))):
        assert trigger.at_test() is trigger


@pytest.mark.parametrize(("raw", "reached"), [(1.0, 8 / 255), (-1.0, -8 / 255), (0.0, 0.0), (0.5, 4 / 255)])
def test_residual_generator_moves_by_a_share_of_epsilon(raw: float, reached: float) -> None:
    out = GeneratorTrigger(Constant(raw), Budget(8 / 255), UNET)(torch.full(SHAPE, 0.5))
    torch.testing.assert_close(out, torch.full(SHAPE, 0.5 + reached))


def test_image_generator_redraws_the_image_within_the_budget() -> None:
    images = torch.tensor([0.0, 0.5, 0.72, 1.0]).reshape(1, 1, 2, 2).expand(2, 3, 2, 2)
    out = GeneratorTrigger(Constant(0.5), Budget(0.1), UNET, "image")(images)  # raw 0.5 draws 0.75 everywhere
    torch.testing.assert_close(out, torch.tensor([0.1, 0.6, 0.75, 0.9]).reshape(1, 1, 2, 2).expand(2, 3, 2, 2))


def test_additive_adds_delta_and_clips_it_to_the_budget() -> None:
    delta = torch.zeros(3, 2, 2)
    delta[0, 0] = torch.tensor([0.05, 0.5])
    out = AdditiveTrigger(delta, Budget(0.1))(torch.full((1, 3, 2, 2), 0.4))
    expected = torch.full((1, 3, 2, 2), 0.4)
    expected[0, 0, 0] = torch.tensor([0.45, 0.5])
    torch.testing.assert_close(out, expected)


def test_additive_refuses_other_sizes() -> None:
    with pytest.raises(ConfigError, match="delta is"):
        AdditiveTrigger(torch.zeros(1, 4, 4), Budget(0.1))
    with pytest.raises(ConfigError, match="size it was made for"):
        AdditiveTrigger(torch.zeros(3, 4, 4), Budget(0.1))(torch.zeros(2, 3, 8, 8))


def _generator(parametrisation: Parametrisation = "residual", epsilon: float = 0.1) -> Trigger:
    torch.manual_seed(0)
    return GeneratorTrigger(GENERATORS.build(UNET), Budget(epsilon), UNET, parametrisation)


def _frequency() -> Trigger:
    return FrequencyTrigger(magnitude=300, test_magnitude=400, window=4, positions=(1, 3))


def _patch() -> Trigger:
    patch = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    return PatchTrigger(patch, seed=1, placement=(0, 0.5), test_placement=(0, 1))


@pytest.mark.parametrize(
    "make",
    [
        IdentityTrigger,
        _generator,
        lambda: _generator("image"),
        lambda: AdditiveTrigger(torch.ones(3, 4, 4), Budget(0)),
        _frequency,
        _patch,
        lambda: _frequency().at_test(),
        lambda: _patch().at_test(),
    ],
)
def test_every_kind_respects_its_budget_and_can_be_differentiated(make: Callable[[], Trigger]) -> None:
    trigger = make()
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = trigger(images)
    assert 0 <= out.min() <= out.max() <= 1
    assert (out - images).abs().max() <= trigger.budget.epsilon + 1e-6
    (gradient,) = torch.autograd.grad(out.sum(), images)
    assert torch.isfinite(gradient).all()


def test_identity_depends_on_kind_budget_spec_and_weights() -> None:
    other = _generator()
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1e-6
    kinds = [_generator(), _generator("image"), _generator(epsilon=0.2), other, IdentityTrigger()]
    kinds += [_frequency(), _frequency().at_test(), _patch(), _patch().at_test()]
    assert len({trigger.identity for trigger in kinds}) == len(kinds)
    assert _generator().identity == _generator().identity


def test_generator_trigger_refuses_a_spec_outside_the_registry() -> None:
    with pytest.raises(ConfigError, match="unknown generator"):
        GeneratorTrigger(Constant(0), Budget(0.1), {"name": "unett"})
