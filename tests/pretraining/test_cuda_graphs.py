"""The compiled step, on the CPU with a back end that traces and generates no code: one graph, and the same training."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from blto.pretraining import METHODS, loop, trainer
from blto.pretraining.spec import OptimizerSpec
from blto.pretraining.trainer import GRAPHS, Trainer, arithmetic, uses_cuda_graphs
from blto.runtime import distributed
from blto.runtime.device import compiled
from tests.factories import tiny_recipe


def losses(run: Trainer) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    batches = [[torch.rand(8, 3, 16, 16, generator=generator) for _ in range(2)] for _ in range(2)]
    return [float(run.train_step(views)["loss"]) for views in batches]


def build(name: str, i_cutmix: float, **how: Any) -> Trainer:
    method = loop.build_method(tiny_recipe(name, i_cutmix=i_cutmix), seed=0, image_size=16)
    return Trainer(method, optimizer=OptimizerSpec(), total_steps=4, device="cpu", precision="fp32", **how)


@pytest.mark.parametrize(
    ("name", "i_cutmix"), [*((name, 0.0) for name in METHODS.names()), ("moco", 1.0), ("simclr", 1.0)]
)
def test_the_step_is_one_graph_that_trains_as_the_plain_one_does(
    name: str, i_cutmix: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build(name, i_cutmix)
    build(name, i_cutmix)  # Fabric is here before `torch.compile` is patched: it wraps it on import
    compiler, asked = torch.compile, []

    def traced(module: Any, **how: Any) -> Any:
        asked.append(how)
        return compiler(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(trainer, "uses_cuda_graphs", lambda engine, device: True)
    compiled = build(name, i_cutmix, cuda_graphs=True)
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    assert asked[0] == {"mode": "reduce-overhead", "dynamic": False}
    assert compiled.arithmetic == f"fp32, {GRAPHS}"
    assert set(compiled.method.state_dict()) == set(plain.method.state_dict())


def test_graphs_are_for_the_fast_engine_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_cuda_graphs("fast", "cuda")
    assert not uses_cuda_graphs("fast", "cpu")
    assert not uses_cuda_graphs("reference", "cuda")
    for module in (trainer, distributed):
        monkeypatch.setattr(module, "process_count", lambda: 2)
    assert not uses_cuda_graphs("fast", "cuda")


def test_a_surrogate_says_that_it_is_trained_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    recipe = tiny_recipe(precision="fp32", engine="fast")
    engines = [arithmetic(recipe, "cuda", 16, cuda_graphs=asked)["engine"] for asked in (True, False)]
    assert engines == [GRAPHS, "plain torch"]


def test_nobody_is_advised_to_round_to_tf32(recwarn: pytest.WarningsRecorder) -> None:
    compiled(torch.nn.Identity())
    warnings.warn("TensorFloat32 tensor cores for float32 are not enabled.", UserWarning, stacklevel=1)
    assert not recwarn.list
