"""The loop: no labels, determinism, exact resume at every kind of position, observers that leave no trace, NaN."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from blto.data.cache import map_array
from blto.data.images import ImageSet, random_access
from blto.errors import ConfigError, Diverged, Interrupted, Mismatch
from blto.files import read_jsonl, show
from blto.models.encoder import Encoder
from blto.models.native.library import find_kernels
from blto.pretraining import METHODS, loop
from blto.pretraining.loop import Pretrained, batch_rows, build_method, observed_epochs, pretrain
from blto.pretraining.snapshots import SnapshotObserver
from blto.pretraining.spec import Engine, RecipeSpec
from blto.pretraining.trainer import Trainer, learning_rate_factor
from blto.runtime import device
from tests.factories import TINY_BACKBONE, random_images, tiny_recipe

IMAGES = random_images(36).without_labels()  # 4 batches of 8 an epoch, 4 images left out


def weights(result: Pretrained) -> list[torch.Tensor]:
    return list(result.encoder.state_dict().values())


def assert_equal(first: Pretrained, second: Pretrained) -> None:
    for one, other in zip(weights(first), weights(second), strict=True):
        assert torch.equal(one, other)
    assert first.trajectory == second.trajectory


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the next training be told to stop once it has done `steps` steps."""
    original, done = Trainer.train_step, 0

    def counting(self: Trainer, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal done
        done += 1
        if done == steps:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return original(self, views)

    monkeypatch.setattr(Trainer, "train_step", counting)


def test_a_labeled_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no labels"):
        pretrain(random_images(), tiny_recipe(), seed=0)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 64, but there are 36"):
        pretrain(IMAGES, tiny_recipe(batch_size=64), seed=0)


@pytest.mark.parametrize("method", METHODS.names())
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(method: str) -> None:
    recipe = tiny_recipe(method)
    first = pretrain(IMAGES, recipe, seed=3)
    torch.rand(5)  # the global generator is none of the loop's business
    assert_equal(first, pretrain(IMAGES, recipe, seed=3))
    other = pretrain(IMAGES, recipe, seed=4)
    assert any(not torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))


@pytest.mark.parametrize(
    ("method", "optimizer"), [("byol", "sgd"), ("byol", "lars"), ("byol", "adamw"), ("moco", "sgd")]
)
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])  # first, mid-epoch, last of an epoch, first of the next, very last
def test_resume_equals_an_uninterrupted_run_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, method: str, optimizer: str
) -> None:
    recipe = tiny_recipe(method, optimizer={"name": optimizer, "lr": 0.01})
    whole = pretrain(IMAGES, recipe, seed=0)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Interrupted, match=f"stopped at step {steps} of 8"):
            pretrain(IMAGES, recipe, seed=0, folder=tmp_path)
    resumed = pretrain(IMAGES, recipe, seed=0, folder=tmp_path, resume=True)
    assert_equal(whole, resumed)
    events = [line["event"] for line in read_jsonl(tmp_path / "log.jsonl")]
    assert "resumed" in events


@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_a_mixed_and_localized_training_resumes_bit_for_bit(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = {"name": "simsiam_cifar", "crop_margin": 0.2}
    recipe = tiny_recipe(method, i_cutmix=1.0, views=views)
    whole = pretrain(IMAGES, recipe, seed=0)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            pretrain(IMAGES, recipe, seed=0, folder=tmp_path)
    assert_equal(whole, pretrain(IMAGES, recipe, seed=0, folder=tmp_path, resume=True))
    unmixed = pretrain(IMAGES, tiny_recipe(method, views=views), seed=0)
    assert any(not torch.equal(a, b) for a, b in zip(weights(whole), weights(unmixed), strict=True))


def test_resume_refuses_another_recipe_seed_or_dataset(tmp_path: Path) -> None:
    pretrain(IMAGES, tiny_recipe(), seed=0, folder=tmp_path)
    for images, recipe, seed in (
        (IMAGES, tiny_recipe(epochs=3), 0),
        (IMAGES, tiny_recipe(), 1),
        (random_images(36, seed=1).without_labels(), tiny_recipe(), 0),
    ):
        with pytest.raises(Mismatch, match="another recipe, seed or dataset"):
            pretrain(images, recipe, seed=seed, folder=tmp_path, resume=True)


def test_resume_refuses_a_run_that_was_begun_in_another_order_of_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("blto.pretraining.loop.ORDER", "an earlier one")
        pretrain(IMAGES, tiny_recipe(), seed=0, folder=tmp_path)
    with pytest.raises(Mismatch):
        pretrain(IMAGES, tiny_recipe(), seed=0, folder=tmp_path, resume=True)


def test_observers_leave_no_trace() -> None:
    class Meddler:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def __call__(self, encoder: Encoder, epoch: int) -> Mapping[str, float]:
            assert not encoder.training
            encoder(torch.rand(4, 3, 16, 16))  # draws, and would move batch norm in training mode
            self.epochs.append(epoch)
            return {"seen": float(epoch)}

    meddler = Meddler()
    observed = pretrain(IMAGES, tiny_recipe(), seed=0, observers=[meddler])
    alone = pretrain(IMAGES, tiny_recipe(), seed=0)
    assert meddler.epochs == [0, 1, 2]
    assert [row["seen"] for row in observed.trajectory] == [0.0, 1.0, 2.0]
    for one, other in zip(weights(observed), weights(alone), strict=True):
        assert torch.equal(one, other)


def test_nan_is_named_by_its_first_step_and_the_last_good_checkpoint_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 2)
    original = Trainer.train_step

    def poisoned(self: Trainer, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.step == 4:
            views = [view * float("nan") for view in views]
        return original(self, views)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(Diverged, match=r"NaN or Inf at step 4 of 8; .* Try a lower optimizer\.lr") as caught:
        pretrain(IMAGES, tiny_recipe(), seed=0, folder=tmp_path, checkpoint_seconds=0)
    assert caught.value.exit_code == 7
    assert f"the last good checkpoint is {show(tmp_path / 'checkpoint.safetensors', 100)}." in str(caught.value)
    monkeypatch.setattr(Trainer, "train_step", original)
    resumed = pretrain(IMAGES, tiny_recipe(), seed=0, folder=tmp_path, resume=True)
    assert_equal(resumed, pretrain(IMAGES, tiny_recipe(), seed=0))


def test_nan_within_an_epoch_is_named_before_an_observer_keeps_it(tmp_path: Path) -> None:
    """Four steps an epoch, far fewer than between two checks."""
    keeper = SnapshotObserver(tmp_path / "snapshots", TINY_BACKBONE, 16)
    recipe = tiny_recipe(optimizer={"lr": 1e20})
    with pytest.raises(Diverged, match=r"NaN or Inf at step [123] of 8; there is no checkpoint yet"):
        pretrain(IMAGES, recipe, seed=0, folder=tmp_path, observers=[keeper])
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["epoch-00000.safetensors"]
    assert [line["event"] for line in read_jsonl(tmp_path / "log.jsonl")] == ["observed"]


def test_a_stop_request_does_not_hide_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(Diverged):
        pretrain(IMAGES, tiny_recipe(optimizer={"lr": 1e20}), seed=0, folder=tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_resume_refuses_another_resolved_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(precision="auto", engine="fast")
    monkeypatch.setattr(device, "native_bf16", lambda _: False)
    pretrain(IMAGES, recipe, seed=0, folder=tmp_path)
    pretrain(IMAGES, recipe, seed=0, folder=tmp_path, resume=True)
    monkeypatch.setattr(device, "native_bf16", lambda _: True)
    with pytest.raises(Mismatch, match="another precision"):
        pretrain(IMAGES, recipe, seed=0, folder=tmp_path, resume=True)


def epoch_of(size: int, *, epoch: int, seed: int = 0) -> list[int]:
    batches = (batch_rows(size, 8, seed=seed, epoch=epoch, batch=batch) for batch in range(size // 8))
    return [int(row) for rows in batches for row in rows]


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own() -> None:
    first = epoch_of(40, epoch=0)
    assert sorted(first) == list(range(40))
    assert first == epoch_of(40, epoch=0)
    assert first != epoch_of(40, epoch=1)
    assert first != epoch_of(40, epoch=0, seed=1)
    assert len(set(epoch_of(43, epoch=0))) == 40, "the remainder is left out"


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [learning_rate_factor(step, total_steps=20, warmup_steps=5) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert factors[12] > factors[13]
    assert factors[20] == pytest.approx(0.0)


def test_observed_epochs_hold_start_and_end() -> None:
    assert observed_epochs(5, 20) == {0, 1, 2, 3, 4, 5}
    assert {0, 200} <= observed_epochs(200, 20)
    assert len(observed_epochs(200, 20)) == 21
    assert observed_epochs(5, 0) == frozenset()


def test_bf16_and_fp32_agree_on_the_first_loss() -> None:
    rows = {
        p: pretrain(IMAGES, tiny_recipe(epochs=1, batch_size=36, precision=p), seed=0).trajectory[-1]
        for p in ("fp32", "bf16")
    }
    assert rows["bf16"]["loss"] == pytest.approx(rows["fp32"]["loss"], abs=0.02)


def flags(path: Path) -> list[str]:
    """What the system has been told about the mapping of `path`; see proc_pid_smaps(5)."""
    text = Path("/proc/self/smaps").read_text()
    return re.search(rf"{re.escape(str(path))}\n(?:.+\n)*?VmFlags: (.*)", text)[1].split()  # type: ignore[index]


def test_a_mapped_set_is_read_at_random_while_it_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", random_images(16).images)
    images = ImageSet(map_array(tmp_path / "a.npy"), None, (), "mapped")
    during: list[bool] = []
    step = Trainer.train_step

    def noting(self: Trainer, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        during.append("rr" in flags(tmp_path / "a.npy"))
        return step(self, views)

    monkeypatch.setattr(Trainer, "train_step", noting)
    pretrain(images, tiny_recipe(epochs=1), seed=0)
    assert during == [True, True]
    assert "rr" not in flags(tmp_path / "a.npy")
    with random_access(random_images(4).images):
        pass  # in memory: nothing to tell


@pytest.mark.skipif(find_kernels()[0] is None, reason=find_kernels()[1])
@pytest.mark.parametrize(
    ("width", "engine", "as_kernels_take_them"), [(16, "fast", True), (24, "fast", False), (16, "reference", False)]
)
def test_weights_lie_as_their_engine_takes_them(width: int, engine: Engine, as_kernels_take_them: bool) -> None:
    """Otherwise every pass copies them."""
    recipe = RecipeSpec(method="simclr", backbone={"name": "small_resnet", "width": width}, precision="bf16")
    method = build_method(recipe, seed=0, image_size=32)
    Trainer(method, optimizer=recipe.optimizer, total_steps=1, device="cpu", precision="bf16", engine=engine)
    weight = method.encoder.get_parameter("backbone.stages.0.conv2.weight")
    assert weight.is_contiguous() == as_kernels_take_them
