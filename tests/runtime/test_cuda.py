"""What only a GPU can show; run by benchmarks/gpu.sh and wherever else there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blto.data.view_source import DeviceViews, HostViews
from blto.data.views import RECIPES
from blto.pretraining import METHODS
from blto.pretraining.loop import build_method, pretrain
from blto.pretraining.trainer import Trainer
from tests.factories import random_images, tiny_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IMAGES = random_images(36).without_labels()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_compiled_views_are_those_of_the_cpu(recipe: str) -> None:
    images, rows = random_images(48, size=32).images, np.arange(32)
    device = DeviceViews(images, RECIPES[recipe], torch.device("cuda"))
    assert isinstance(device.images, torch.Tensor)
    found, wanted = device(rows, seed=3, epoch=2), HostViews(images, RECIPES[recipe])(rows, seed=3, epoch=2)
    for view, host_view in zip(found, wanted, strict=True):
        assert view.device.type == "cuda"
        assert (view.cpu() - host_view).abs().max() <= 0.1 / 255


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("method", METHODS.names())
def test_a_gpu_trains_as_the_cpu_does(method: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(method, engine=engine)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_gpu, on_cpu = (pretrain(IMAGES, recipe, seed=0, device=device).trajectory for device in ("cuda", "cpu"))
    assert [row["loss"] for row in on_gpu[1:]] == pytest.approx([row["loss"] for row in on_cpu[1:]], abs=0.02)


def test_bf16_trains_on_a_gpu() -> None:
    recipe = tiny_recipe(precision="bf16", engine="fast")
    rows = pretrain(IMAGES, recipe, seed=0, device="cuda").trajectory
    assert all(np.isfinite(row["loss"]) for row in rows[1:])


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("method", METHODS.names())
def test_neither_views_nor_step_wait_for_the_gpu(method: str, optimizer: str) -> None:
    recipe = tiny_recipe(method, optimizer={"name": optimizer})
    built = build_method(recipe, seed=0, image_size=16)
    run = Trainer(built, optimizer=recipe.optimizer, total_steps=4, device="cuda", precision="fp32")
    source, rows = DeviceViews(IMAGES.images, recipe.views, torch.device("cuda")), np.arange(8)
    run.train_step(source(rows, seed=0, epoch=0))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step(source(rows, seed=0, epoch=1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
