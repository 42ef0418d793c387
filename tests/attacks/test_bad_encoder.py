"""BadEncoder: where the square is, what stays as it was, and that triggered images meet the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blto import experiment
from blto.attacks.bad_encoder import BadEncoder, reference_of
from blto.attacks.base import EncoderTampering, Surroundings, Tampered
from blto.errors import ConfigError, Diverged, Interrupted, Mismatch
from blto.evaluation import extract
from blto.experiment import Environment, ExperimentSpec
from blto.models.encoder import Encoder, build_encoder
from blto.poisoning import Trigger, apply_to_uint8
from blto.pretraining import fine_tuning
from blto.records import RunStore
from tests.factories import random_images
from tests.tiny_experiment import TINY_EXPERIMENT

IMAGES = random_images(64, size=32)
BACKBONE = {"name": "small_resnet", "width": 8}
OPTIONS: dict[str, Any] = {"target_class": 1, "epochs": 10, "batch_size": 16, "lr": 0.03}
ON_CPU = Surroundings("cpu")


def clean() -> Encoder:
    return build_encoder(BACKBONE, seed=0).eval()


def square(size: int = 32, **options: Any) -> Trigger:
    attack = BadEncoder(target_class=1, **options)
    return attack.train_trigger(random_images(4, size=size), seed=0, surroundings=ON_CPU).trigger


def tamper(surroundings: Surroundings = ON_CPU, seed: int = 0, **options: Any) -> Tampered:
    return BadEncoder(**OPTIONS | options).tamper(clean(), square(), IMAGES, seed=seed, surroundings=surroundings)


def cosines(first: Encoder, second: Encoder, images: np.ndarray, others: np.ndarray) -> torch.Tensor:
    one, other = F.normalize(extract(first, images).vectors), F.normalize(extract(second, others).vectors)
    return (one * other).sum(dim=1)


@pytest.mark.parametrize(("side", "size", "corner"), [(32, 10, 21), (64, 20, 42)])
def test_the_square_is_white_and_where_the_authors_have_it(side: int, size: int, corner: int) -> None:
    images = random_images(6, size=side).images
    changed = apply_to_uint8(square(side), images)
    inside = (..., slice(corner, corner + size), slice(corner, corner + size))
    assert (changed[inside] == 255).all()
    outside = np.ones(images.shape, dtype=bool)
    outside[inside] = False
    assert np.array_equal(changed[outside], images[outside])
    assert np.array_equal(apply_to_uint8(square(side).at_test(), images), changed)


def test_triggered_images_move_to_the_reference_and_clean_ones_stay() -> None:
    before, result = clean(), tamper()
    triggered = apply_to_uint8(square(), IMAGES.images)
    reference = IMAGES.images[[reference_of(before, IMAGES, 1)] * len(IMAGES)]
    start, end = (cosines(each, each, triggered, reference).mean() for each in (before, result.encoder))
    assert end > 0.95
    assert 1 - end < (1 - start) / 4
    assert cosines(before, result.encoder, IMAGES.images, IMAGES.images).mean() > 0.95
    assert cosines(before, result.encoder, reference[:1], reference[:1]) > 0.95
    assert [row["epoch"] for row in result.trajectory] == list(range(11))
    assert result.trajectory[-1]["backdoor"] < result.trajectory[1]["backdoor"]


def test_each_loss_is_a_cosine_with_its_weight() -> None:
    weights: dict[str, Any] = {"lambda_1": 2.0, "lambda_2": 3.0}
    plain, weighted = tamper(epochs=1).trajectory[-1], tamper(epochs=1, **weights).trajectory[-1]
    for name, weight in (("backdoor", 1), ("reference", 2), ("utility", 3)):
        assert -1 <= plain[name] < -0.8
        assert -weight <= weighted[name] < -0.8 * weight


def test_batch_norm_is_left_alone_and_convolutions_are_not() -> None:
    before, after = clean(), tamper().encoder
    norms = [name for name, module in before.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    changed = after.state_dict()
    for name, value in before.state_dict().items():
        of_norm = name.rpartition(".")[0] in norms
        assert torch.equal(value, changed[name]) == (of_norm or name in {"mean", "std"}), name
    assert all(parameter.requires_grad for parameter in after.parameters())
    assert not after.native


def test_the_reference_is_the_target_class_s_most_typical_image() -> None:
    encoder = clean()
    vectors = F.normalize(extract(encoder, IMAGES.images).vectors)
    of_class = np.flatnonzero(IMAGES.labels == 1)
    mean = F.normalize(vectors[of_class].mean(dim=0), dim=0)
    chosen = reference_of(encoder, IMAGES, 1)
    assert IMAGES.labels is not None
    assert IMAGES.labels[chosen] == 1
    assert torch.isclose(vectors[chosen] @ mean, (vectors[of_class] @ mean).max())


def test_it_is_a_function_of_its_seed() -> None:
    one, again, other = tamper(epochs=1), tamper(epochs=1), tamper(epochs=1, seed=1)
    first, second, third = (list(each.encoder.parameters()) for each in (one, again, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize("steps", [1, 4, 6])  # the first, the last of an epoch, within one
def test_resume_equals_an_uninterrupted_run_bit_for_bit(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tamper(epochs=2)
    taken = 0

    class Stop:
        signal_number = 15

        def __enter__(self) -> Stop:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __bool__(self) -> bool:
            nonlocal taken
            taken += 1
            return taken >= steps

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "stop_requests", Stop)
        with pytest.raises(Interrupted, match=f"stopped at step {steps} of 8"):
            tamper(Surroundings("cpu", tmp_path), epochs=2)
    resumed = tamper(Surroundings("cpu", tmp_path, resume=True), epochs=2)
    assert resumed.trajectory == whole.trajectory
    weights = zip(whole.encoder.parameters(), resumed.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    with pytest.raises(Mismatch, match="another recipe"):
        tamper(Surroundings("cpu", tmp_path, resume=True), epochs=2, lr=0.01)


def test_a_loss_that_is_no_number_is_named_by_its_step() -> None:
    encoder = clean()
    with pytest.raises(Diverged, match=r"step \d+ of 40; lower its learning rate"):
        BadEncoder(**OPTIONS | {"lr": 1e30}).tamper(encoder, square(), IMAGES, seed=0, surroundings=ON_CPU)
    assert not encoder.native
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 12}, r"attack.patch_size is 12 at attack.corner 21"),
        ({"corner": 25}, r"attack.patch_size is 10 at attack.corner 25"),
        ({"shadow_images": 65}, r"attack.shadow_images is 65"),
        ({"batch_size": 65}, r"attack.batch_size 65"),
        ({"shadow_images": 8, "batch_size": 16}, r"attack.shadow_images is 8 and attack.batch_size 16"),
    ],
)
def test_a_square_that_leaves_the_image_or_too_few_images_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BadEncoder(target_class=1, **{"batch_size": 16, **options}).check_images(IMAGES)


def test_the_attacker_s_own_images_are_what_it_must_have_enough_of(tmp_path: Path) -> None:
    attack = {"name": "bad_encoder", "target_class": 1, "epochs": 1, "batch_size": 100}
    given = {**TINY_EXPERIMENT, "attack": attack, "attacker_share": 0.5}
    with pytest.raises(ConfigError, match=r"attack.batch_size 100, but the attacker has 60 images"):
        experiment.run(ExperimentSpec.parse(given), Environment(RunStore(tmp_path), device="cpu"))


def test_an_experiment_tampers_with_the_clean_twin_and_poisons_nothing(tmp_path: Path) -> None:
    attack = {"name": "bad_encoder", "target_class": 1, "epochs": 2, "batch_size": 16}
    spec = ExperimentSpec.parse({**TINY_EXPERIMENT, "attack": attack})
    environment = Environment(RunStore(tmp_path), device="cpu")
    record = experiment.run(spec, environment)
    assert record.provenance["poison"]["images"] == 0
    stages = record.provenance["stages"]
    assert stages["victim"].startswith("tamper-")
    assert stages["clean_twin"].startswith("pretrain-")
    assert [row["epoch"] for row in record.trajectory] == [0, 1, 2]
    assert "backdoor" in record.trajectory[-1]
    at_start, twin_s_end = record.trajectory[0], record.trajectory_clean_twin[-1]
    assert at_start["knn_asr"] == twin_s_end["knn_asr"], "it starts as the clean twin"
    assert issubclass(BadEncoder, EncoderTampering)
    made = (tmp_path / "stages" / stages["victim"] / "encoder.safetensors").stat().st_mtime_ns
    assert experiment.run(spec, environment).run_id == record.run_id
    assert (tmp_path / "stages" / stages["victim"] / "encoder.safetensors").stat().st_mtime_ns == made
