"""Extraction: every image once, in evaluation mode, leaving the encoder as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from blto.errors import ConfigError, Diverged
from blto.evaluation import features
from blto.evaluation.features import Features, evaluating, extract, is_finite
from blto.models.encoder import Encoder, build_encoder
from blto.models.folded import FoldedEncoder
from tests.factories import TINY_BACKBONE

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 3, 8, 8), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 23)


def make_encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)
    )


class Pixels(nn.Module):
    """The images themselves, and a note of every batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return images.flatten(1)


def test_features_are_those_of_evaluation_mode() -> None:
    encoder = make_encoder()
    found = extract(encoder, IMAGES, LABELS)
    with torch.no_grad():
        expected = copy.deepcopy(encoder).eval()(torch.from_numpy(IMAGES) / 255)
    assert torch.allclose(found.vectors, expected, atol=1e-6)
    assert found.vectors.dtype == torch.float32
    assert found.vectors.device.type == "cpu"
    assert not found.vectors.is_inference()
    assert found.labels is not None
    assert found.labels.tolist() == LABELS.tolist()
    assert found.indices.tolist() == list(range(23))


def test_nothing_about_the_encoder_changes() -> None:
    encoder = make_encoder().train()
    encoder[1].eval()  # a frozen batch norm inside a training encoder
    before = copy.deepcopy(encoder.state_dict())
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    extract(encoder, IMAGES)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert [part.training for part in encoder.children()] == [True, False, True, True, True, True]
    assert encoder.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_mode_is_restored_after_an_error() -> None:
    encoder = make_encoder().train()
    with evaluating(encoder):
        assert not any(part.training for part in encoder.modules())
    with pytest.raises(ZeroDivisionError), evaluating(encoder):
        1 // 0  # noqa: B018  # any error will do
    assert all(part.training for part in encoder.modules())


@pytest.mark.parametrize(("batch_size", "batches"), [(10, [10, 10, 3]), (23, [23]), (22, [22, 1]), (1, [1] * 23)])
def test_no_image_is_dropped(batch_size: int, batches: list[int]) -> None:
    encoder = Pixels()
    found = extract(encoder, IMAGES, batch_size=batch_size)
    assert encoder.batches == batches
    assert torch.equal(found.vectors, torch.from_numpy(IMAGES).float().div(255).flatten(1))
    assert found.labels is None


def test_memory_maps_are_read_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    mapped: npt.NDArray[np.uint8] = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert torch.equal(extract(Pixels(), mapped).vectors, extract(Pixels(), IMAGES).vectors)


def test_chosen_rows_keep_their_labels_and_order() -> None:
    rows = np.array([7, 2, 19])
    found = extract(Pixels(), IMAGES, LABELS, indices=rows, batch_size=2)
    assert torch.equal(found.vectors, extract(Pixels(), IMAGES[rows]).vectors)
    assert found.labels is not None
    assert found.labels.tolist() == LABELS[rows].tolist()
    assert found.indices.tolist() == rows.tolist()


def test_bf16_is_close_and_still_float32() -> None:
    encoder = make_encoder()
    exact, coarse = extract(encoder, IMAGES).vectors, extract(encoder, IMAGES, bf16=True).vectors
    assert coarse.dtype == torch.float32
    assert torch.allclose(exact, coarse, atol=0.03)
    assert not torch.equal(exact, coarse)


def test_our_own_nets_are_folded_and_change_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder(TINY_BACKBONE, seed=0)
    encoder(torch.rand(16, 3, 8, 8))  # in training mode: batch statistics that are not those of a fresh net
    before = copy.deepcopy(encoder.state_dict())
    used: list[nn.Module] = []

    class Noted(FoldedEncoder):
        def __init__(self, given: Encoder, *, image_size: tuple[int, int]) -> None:
            used.append(given)
            super().__init__(given, image_size=image_size)
            assert image_size == IMAGES.shape[2:]

    monkeypatch.setattr(features, "FoldedEncoder", Noted)
    found = extract(encoder, IMAGES, batch_size=10).vectors
    assert used == [encoder]
    assert encoder.training
    assert all(
        torch.equal(before[name], value) and value.is_contiguous() for name, value in encoder.state_dict().items()
    )
    with torch.inference_mode():
        expected = copy.deepcopy(encoder).eval()(torch.from_numpy(IMAGES) / 255)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    coarse = extract(encoder, IMAGES, bf16=True).vectors
    assert used == [encoder]
    assert 1e-4 < (coarse - expected).abs().max() / expected.abs().max() < 0.05


def test_hooks_of_our_own_nets_are_called() -> None:
    encoder, seen = build_encoder(TINY_BACKBONE, seed=0), []
    encoder.backbone.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    extract(encoder, IMAGES, batch_size=20)
    assert seen == [20, 3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_entry_is_not_finite(bad: float) -> None:
    tensor = torch.arange(1000.0).view(10, 100)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    tensor[7, 31] = bad
    assert not is_finite(tensor)


class Broken(nn.Module):
    """Divides by zero, as a diverged encoder does."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 0


def test_a_diverged_encoder_has_no_features() -> None:
    with pytest.raises(Diverged):
        extract(Broken(), IMAGES)


def test_wrong_inputs_are_refused() -> None:
    floats: npt.NDArray[Any] = IMAGES.astype(np.float32)
    for images in (floats, IMAGES[0], IMAGES.transpose(0, 2, 3, 1), IMAGES[:0]):
        with pytest.raises(ConfigError):
            extract(Pixels(), images)
    with pytest.raises(ConfigError):
        extract(Pixels(), IMAGES, LABELS[:-1])
    with pytest.raises(ConfigError):
        extract(Pixels(), IMAGES, batch_size=0)
    with pytest.raises(ConfigError, match="pool"):
        extract(nn.Identity(), IMAGES)


def test_features_check_their_columns() -> None:
    vectors, column = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for arguments in ((vectors.double(), None, column), (vectors[0], None, column), (vectors, column[:2], column)):
        with pytest.raises(ConfigError):
            Features(*arguments)
    with pytest.raises(ConfigError):
        Features(vectors, None, column.int())
