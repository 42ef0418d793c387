"""Two processes on the CPU (gloo) train as one does: losses, gradients and weights to 1e-5 in fp32, without batch norm.

Both processes go through every scenario once and leave what they found in a file each.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from blto.errors import ConfigError, Interrupted
from blto.files import read_jsonl
from blto.models.encoder import Encoder
from blto.pretraining import METHODS, loop
from blto.pretraining.loop import pretrain
from blto.pretraining.method import SSLMethod
from blto.pretraining.spec import OptimizerSpec
from blto.pretraining.trainer import Trainer
from blto.runtime.distributed import process_number, require_one_process, share
from tests.factories import random_images, tiny_recipe

PROCESSES = 2
STEPS = 3
IMAGES = random_images(36).without_labels()  # four batches of 8 an epoch, 4 images left out
BUILD = loop.build_method
Found = dict[str, Any]


def without_batch_norm(module: nn.Module) -> None:
    for name, part in module.named_children():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.Identity())
        without_batch_norm(part)


def build(*given: Any, **how: Any) -> SSLMethod:
    """A method whose net and heads have no batch norm."""
    method = BUILD(*given, **how)
    without_batch_norm(method)
    return method


def train(name: str) -> Found:
    """A few steps on this process's share: losses, the first step's gradients, and the last weights."""
    method = build(tiny_recipe(name), seed=0, image_size=16)
    run = Trainer(method, optimizer=OptimizerSpec(lr=0.1), total_steps=STEPS, device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(1)
    found: Found = {"losses": [], "gradients": {}}
    for _ in range(STEPS):
        views = [torch.rand(8, 3, 16, 16, generator=generator) for _ in range(2)]
        rows = torch.from_numpy(share(torch.arange(8).numpy()))
        found["losses"].append(run.train_step([view[rows] for view in views])["loss"])
        if not found["gradients"]:
            found["gradients"] = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    return {**found, "weights": dict(method.state_dict())}


def epochs(encoder: Encoder, epoch: int) -> dict[str, float]:
    return {"observed by": float(process_number())}


def whole_run(folder: Path | None, *, resume: bool = False) -> Found:
    result = pretrain(IMAGES, tiny_recipe(), seed=0, folder=folder, resume=resume, observers=[epochs])
    return {"weights": result.encoder.state_dict(), "trajectory": result.trajectory}


def stopped_run(folder: Path) -> str:
    """The second process alone is told to stop, in the third step; both are asked every other step."""
    original = Trainer.train_step

    def stopping(self: Trainer, views: list[Tensor]) -> dict[str, Tensor]:
        if self.step == 2 and process_number() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, views)

    Trainer.train_step, loop.STEPS_BETWEEN_CHECKS = stopping, 2  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(Interrupted) as caught:
            whole_run(folder)
    finally:
        Trainer.train_step = original  # type: ignore[method-assign]
    return str(caught.value)


def message(call: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def process(number: int, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'group'}", rank=number, world_size=PROCESSES)
    found: Found = {
        "batch norm": message(lambda: pretrain(IMAGES, tiny_recipe(), seed=0)),
        "odd batch": message(lambda: pretrain(IMAGES, tiny_recipe(batch_size=9), seed=0)),
        "mixing": message(lambda: pretrain(IMAGES, tiny_recipe(i_cutmix=1.0), seed=0)),
        "crafting": message(lambda: require_one_process("crafting a trigger")),
        **{name: train(name) for name in METHODS.names()},
    }
    loop.build_method = build
    found["whole"] = whole_run(folder / "whole")
    found["stopped"] = stopped_run(folder / "stopped")
    found["resumed"] = whole_run(folder / "stopped", resume=True)
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    spawn(process, (folder,), nprocs=PROCESSES)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[Found]:
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(PROCESSES)]


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS.names())
def test_losses_gradients_and_weights_are_those_of_one_process(name: str, both: list[Found]) -> None:
    alone = train(name)
    assert max(float(gradient.abs().max()) for gradient in alone["gradients"].values()) > 1e-2
    for found in both:
        for kind in ("losses", "gradients", "weights"):
            assert_same(found[name][kind], alone[kind])


def test_a_whole_pretraining_is_that_of_one_process(both: list[Found], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_method", build)
    alone = whole_run(None)
    for found in both:
        assert_same(found["whole"]["weights"], alone["weights"])
        assert_same(*([row["loss"] for row in run["trajectory"][1:]] for run in (found["whole"], alone)))


def test_only_the_first_process_observes_and_writes(both: list[Found], folder: Path) -> None:
    assert [row["observed by"] for row in both[0]["whole"]["trajectory"]] == [0.0, 0.0, 0.0]
    assert not any("observed by" in row for row in both[1]["whole"]["trajectory"])
    lines = read_jsonl(folder / "whole" / "log.jsonl")
    assert [line["event"] for line in lines] == ["observed", "observed", "observed", "step"]
    assert sorted(path.name for path in (folder / "whole").iterdir()) == ["checkpoint.safetensors", "log.jsonl"]


def test_a_stop_request_to_one_stops_both_at_the_same_step_and_they_resume_to_the_bit(both: list[Found]) -> None:
    assert [found["stopped"] for found in both] == [
        "stopped at step 4 of 8; its state is saved; run the same command with --resume."
    ] * 2
    for found in both:
        for name, weight in found["whole"]["weights"].items():
            assert torch.equal(found["resumed"]["weights"][name], weight)


def test_what_several_processes_cannot_do_is_refused_in_one_line(both: list[Found]) -> None:
    for found in both:
        assert found["batch norm"].startswith("the net has batch norm, which 2 processes on the CPU would")
        assert found["odd batch"] == "batch_size is 9, which 2 processes cannot share; give a multiple."
        assert found["mixing"] == "method.i_cutmix is above 0, which is for one process; give 0, or start one."
        assert found["crafting"].startswith("crafting a trigger runs in one process, but 2 were started")
