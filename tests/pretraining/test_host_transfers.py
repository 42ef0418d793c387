"""Nothing in a training step, nor in the views of a GPU, is read on the host: all of it runs on the meta device.

A meta tensor has no values, so `.item()`, `.cpu()`, `.numpy()`, `if tensor:` and shapes that depend on values raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blto.data.view_source import DeviceViews
from blto.data.views import RECIPES
from blto.pretraining import METHODS, loop
from blto.pretraining.spec import OptimizerSpec
from blto.pretraining.trainer import Trainer
from tests.factories import random_images, tiny_recipe

META = torch.device("meta")
OPTIMIZERS = ("sgd", "lars", "adamw")


@pytest.fixture(autouse=True)
def _meta_is_a_device_to_train_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules move in place, so that the optimiser has what moved; autocast, unknown to the device, is left out."""
    autocast = torch.autocast

    def where_known(kind: str, *given: Any, **how: Any) -> AbstractContextManager[Any]:
        return nullcontext() if kind == "meta" else autocast(kind, *given, **how)

    monkeypatch.setattr(torch, "autocast", where_known)
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def on_meta(method: str, optimizer: str = "sgd", i_cutmix: float = 0.0) -> Trainer:
    built = loop.build_method(tiny_recipe(method, i_cutmix=i_cutmix), seed=0, image_size=16)
    spec = OptimizerSpec.model_validate({"name": optimizer})
    run = Trainer(built, optimizer=spec, total_steps=4, device="cpu", precision="fp32")
    run.method.to(META)
    run.first_bad_step = run.first_bad_step.to(META)
    return run


def views() -> list[Tensor]:
    return [torch.rand(8, 3, 16, 16, device=META) for _ in range(2)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS.names())
def test_a_training_step_reads_nothing_on_the_host(method: str, optimizer: str) -> None:
    run = on_meta(method, optimizer)
    for _ in range(2):  # the second step has an optimiser state
        losses = run.train_step(views())
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    assert all(parameter.grad is not None for parameter in trained)
    for tensor in (*trained, *losses.values(), run.first_bad_step):
        assert tensor.device == META


@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_a_mixed_step_reads_nothing_on_the_host(method: str) -> None:
    run = on_meta(method, i_cutmix=1.0)
    for _ in range(2):
        assert run.train_step(views())["loss"].device == META


@pytest.mark.parametrize(
    "read",
    [Tensor.item, Tensor.cpu, Tensor.nonzero, Tensor.tolist, bool, lambda tensor: tensor.cpu().numpy()],
    ids=["item", "cpu", "nonzero", "tolist", "bool", "numpy"],
)
def test_a_step_that_reads_its_loss_is_found_out(
    read: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = on_meta("simclr")
    original = run.method.losses

    def reading(given: list[Tensor]) -> dict[str, Tensor]:
        losses = original(given)
        read(losses["loss"].detach())
        return losses

    monkeypatch.setattr(run.method, "losses", reading)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run.train_step(views())


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_on_a_device_read_nothing_on_the_host(recipe: str) -> None:
    source = DeviceViews(random_images(16).images, RECIPES[recipe], META)
    for view in source(np.arange(8), seed=0, epoch=0):
        assert view.device == META
        assert view.shape == (8, 3, 16, 16)
