"""Rounding to 8 bits keeps the budget, and applying a trigger leaves it as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from blto.errors import ConfigError, Diverged
from blto.models import GENERATORS
from blto.poisoning import AdditiveTrigger, Budget, GeneratorTrigger, IdentityTrigger, apply_to_uint8, quantise

RESNET = {"name": "resnet", "width": 4, "blocks": 1}
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)


def test_quantise_rounds_half_to_even_and_clips() -> None:
    values = torch.tensor([-0.5, 0.0, 0.5 / 255, 1.5 / 255, 2.6 / 255, 1.0, 1.5], dtype=torch.float64)
    assert quantise(values).tolist() == [0, 0, 0, 2, 3, 255, 255]


def test_quantise_returns_every_8_bit_value_unchanged() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(levels.float() / 255), levels)


def test_quantise_refuses_nan() -> None:
    with pytest.raises(Diverged, match="NaN or Inf"):
        quantise(torch.tensor([0.1, float("nan")]))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    hnp.arrays(np.uint8, (2, 3, 2, 2)),
    hnp.arrays(np.float32, (3, 2, 2), elements=st.floats(-1, 1, width=32)),
    st.floats(0, 1),
)
def test_triggered_images_stay_within_epsilon_after_rounding(pixels: np.ndarray, delta: np.ndarray, eps: float) -> None:
    out = apply_to_uint8(AdditiveTrigger(torch.from_numpy(delta), Budget(eps)), pixels)
    assert np.abs(out.astype(int) - pixels).max() <= eps * 255 + 1e-4


def test_the_paper_s_budget_is_reached_and_not_passed() -> None:
    up = AdditiveTrigger(torch.ones(3, 8, 8), Budget(8 / 255))
    assert np.array_equal(apply_to_uint8(up, PIXELS), np.minimum(PIXELS.astype(int) + 8, 255))


def test_a_budget_between_two_levels_rounds_towards_the_image() -> None:
    up = AdditiveTrigger(torch.ones(3, 8, 8), Budget(8.9 / 255))  # plain rounding would give 9 levels
    assert np.array_equal(apply_to_uint8(up, PIXELS), np.minimum(PIXELS.astype(int) + 8, 255))


@pytest.mark.parametrize(
    "trigger", [IdentityTrigger(), AdditiveTrigger(torch.ones(3, 8, 8), Budget(0.0))], ids=["identity", "epsilon 0"]
)
def test_no_budget_gives_identical_bytes(trigger: AdditiveTrigger) -> None:
    out = apply_to_uint8(trigger, PIXELS)
    assert out.tobytes() == PIXELS.tobytes()
    assert out is not PIXELS


def test_result_does_not_depend_on_batch_size_and_input_is_kept() -> None:
    torch.manual_seed(0)
    trigger = GeneratorTrigger(GENERATORS.build(RESNET), Budget(0.2), RESNET)
    given_bytes = PIXELS.tobytes()
    frozen = PIXELS.copy()
    frozen.setflags(write=False)  # as a memory-mapped set is
    one = apply_to_uint8(trigger, frozen, batch_size=1)
    assert np.array_equal(one, apply_to_uint8(trigger, PIXELS, batch_size=3))
    assert not np.array_equal(one, PIXELS)
    assert PIXELS.tobytes() == given_bytes


def test_trigger_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    trigger = GeneratorTrigger(GENERATORS.build(RESNET), Budget(0.2), RESNET).train()
    frozen = next(module for module in trigger.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    modes, identity = [module.training for module in trigger.modules()], trigger.identity
    apply_to_uint8(trigger, PIXELS)
    assert [module.training for module in trigger.modules()] == modes
    assert not frozen.training
    assert trigger.identity == identity  # batch norm statistics among the rest


class Failing(AdditiveTrigger):
    def candidate(self, images: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return images * float("nan")


def test_nan_is_an_error_and_not_a_black_image() -> None:
    trigger = Failing(torch.zeros(3, 8, 8), Budget(0.1)).train()
    with pytest.raises(Diverged):
        apply_to_uint8(trigger, PIXELS)
    assert trigger.training


@pytest.mark.parametrize("images", [PIXELS.astype(np.float32), PIXELS[0], PIXELS[:, :1]])
def test_other_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="accepted are uint8"):
        apply_to_uint8(IdentityTrigger(), images)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        apply_to_uint8(IdentityTrigger(), PIXELS, batch_size=0)


def test_no_images_give_no_images() -> None:
    assert apply_to_uint8(IdentityTrigger(), PIXELS[:0]).shape == (0, 3, 8, 8)
