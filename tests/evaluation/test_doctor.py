"""The check of a trigger, on encoders whose reaction is known by construction."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from blto.data.images import ImageSet
from blto.data.views import ViewRecipe, Views
from blto.errors import ConfigError
from blto.evaluation import doctor, similarity
from blto.evaluation.doctor import UNEDITED, Reaction, edits, jpeg, reach, react, resized, works
from blto.poisoning.aim import Aim
from blto.records import Metric

Images = npt.NDArray[np.uint8]
SIZE, TARGET = 16, 1
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
WHOLE = ViewRecipe(
    crop_scale=(1, 1), crop_ratio=(1, 1), jitter_probability=0, grayscale_probability=0, blur_probability=(0, 0)
)


def plain(*colours: tuple[int, int, int]) -> Images:
    """One image of each colour."""
    return np.array(colours, np.uint8)[:, :, None, None].repeat(SIZE, axis=2).repeat(SIZE, axis=3)


def labeled(images: Images, *labels: int) -> ImageSet:
    return ImageSet(images, np.array(labels, np.int64), ("red", "green", "blue"), "colours")


class MeanColour(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


BANK = labeled(plain(RED, GREEN, BLUE), 0, 1, 2)
MEASURED = labeled(plain(RED, BLUE, GREEN), 0, 2, 1)


def reactions(triggered: Images, encoder: nn.Module | None = None, **changed: ImageSet) -> dict[str, Reaction]:
    return react(
        encoder or MeanColour(),
        bank=changed.get("bank", BANK),
        references=changed.get("bank", BANK).images[1:2],
        measured=changed.get("measured", MEASURED),
        triggered=triggered,
        target_class=TARGET,
        views=Views(WHOLE, SIZE),
        probes={"knn": {"k": 1}, "linear": {}},
    )


def test_a_tiny_case_by_hand() -> None:
    """Clean features (1,0,0) and (0,0,1), target (0,1,0); the trigger turns red to (0.2,1,0) and leaves blue alone.

    From the clean mean (.5,0,.5) the target lies at (-.5,1,-.5), and the triggered red at (-.3,1,-.5).
    """
    found = reactions(plain((51, 255, 0), BLUE, GREEN))[UNEDITED]
    of_red = 2.8 / math.sqrt(6 * 1.34)
    assert found.similarity == pytest.approx({"triggered": of_red / 2, "clean": 0, "target": 1}, abs=1e-6)
    for metrics in found.metrics.values():
        assert {name: metric.value for name, metric in metrics.items()} == {
            "asr": 0.5,
            "untriggered_rate": 0.0,
            "clean_accuracy": 1.0,
        }
        assert metrics["asr"].n == 2
        assert metrics["asr"].low is not None
        assert 0 < metrics["asr"].low < 0.5


def test_a_trigger_that_paints_everything_in_the_target_s_colour_passes_and_survives() -> None:
    found = reactions(plain(GREEN, GREEN, GREEN))
    assert list(found) == [UNEDITED, "JPEG 90", "JPEG 75", "JPEG 50", "resized to 12"]
    for reaction in found.values():
        assert reaction.metrics["linear"]["asr"].value == 1
        assert reaction.similarity["triggered"] == pytest.approx(reaction.similarity["target"], abs=1e-3)
        assert works(reaction)


def test_no_trigger_fails() -> None:
    found = reactions(MEASURED.images)[UNEDITED]
    assert found.similarity["triggered"] == found.similarity["clean"]
    assert found.metrics["knn"]["asr"].value == 0
    assert not works(found)


def test_an_image_of_the_target_class_is_no_success() -> None:
    found = reactions(plain(RED, BLUE, RED))[UNEDITED]
    assert found.metrics["knn"]["asr"].value == 0
    assert found.metrics["knn"]["asr"].n == 2


class Checker(nn.Module):
    """Bright or dark, and mistakes a checkerboard of one level for light."""

    def forward(self, images: Tensor) -> Tensor:
        sign = 1 - 2 * (torch.arange(SIZE).unsqueeze(1) + torch.arange(SIZE)).remainder(2)
        light = images.mean(dim=(1, 2, 3)) + 1000 * (images * sign).mean(dim=(1, 2, 3))
        return torch.stack((1 - light, light), dim=1)


def test_jpeg_kills_a_checkerboard_of_one_bit() -> None:
    dark, bright = (60, 60, 60), (200, 200, 200)
    known = ImageSet(plain(dark, bright), np.array([0, 1]), ("dark", "bright"), "light")
    one_bit = known.images + (1 - np.indices((SIZE, SIZE)).sum(axis=0) % 2).astype(np.uint8)
    found = reactions(one_bit, Checker(), bank=known, measured=known)
    asr = {name: reaction.metrics["knn"]["asr"].value for name, reaction in found.items()}
    assert asr == {UNEDITED: 1, "JPEG 90": 0, "JPEG 75": 0, "JPEG 50": 0, "resized to 12": asr["resized to 12"]}
    assert reach(known.images, one_bit) == {"max": 1.0, "mean": 0.5}


def test_the_similarity_is_that_of_the_attacker_s_own_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    triggered, clean, target, references = (torch.randn(9, 5, generator=generator) + i for i in range(4))
    found = similarity(triggered=triggered, clean=clean, target=target, references=references)["centred"]
    aim = Aim.at(references, clean, centred=True)
    assert found == pytest.approx(float(aim.similarities(triggered).triggered), abs=1e-6)


def test_every_call_sees_an_image_in_the_same_view() -> None:
    images, views = np.random.default_rng(0).integers(0, 256, (300, 3, SIZE, SIZE), np.uint8), Views(ViewRecipe(), SIZE)
    first, second = (doctor.view_features(MeanColour(), images, views) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, torch.from_numpy(images).float().mean(dim=(2, 3)) / 255, atol=0.05)
    assert torch.equal(doctor.view_features(MeanColour(), images[:10], views), first[:10])


def test_how_far_a_trigger_reaches_is_counted_in_levels_both_ways() -> None:
    images = plain((10, 20, 30))
    changed = images.copy()
    changed[0, 0], changed[0, 1, 0, 0] = 4, 29  # a whole channel by -6, one value by +9
    assert reach(images, changed) == pytest.approx({"max": 9.0, "mean": (6 * SIZE**2 + 9) / (3 * SIZE**2)})


def noise(size: int = 32) -> Images:
    return np.random.default_rng(0).integers(0, 256, (2, 3, size, size), np.uint8)


@pytest.mark.parametrize("edit", [lambda images: jpeg(images, 90), lambda images: resized(images, 24)])
def test_edits_keep_what_is_smooth_and_change_what_is_not(edit: Callable[[Images], Images]) -> None:
    smooth = plain((10, 20, 30), (200, 100, 50))
    for images in (smooth, noise()):
        before = images.copy()
        edited = edit(images)
        assert (edited.shape, str(edited.dtype), edited.flags.c_contiguous) == (images.shape, "uint8", True)
        assert (images == before).all()
    assert np.abs(edit(smooth).astype(int) - smooth).max() <= 2
    assert np.abs(edit(noise()).astype(int) - noise()).mean() > 20


def test_a_lower_quality_changes_more_and_24_of_32_pixels_are_kept() -> None:
    assert list(edits(32)) == [UNEDITED, "JPEG 90", "JPEG 75", "JPEG 50", "resized to 24"]
    change = [np.abs(edit(noise()).astype(int) - noise()).mean() for edit in edits(32).values()]
    assert change[0] == 0
    assert 0 < change[1] < change[2] < change[3]
    assert (edits(32)["resized to 24"](noise()) == resized(noise(), 24)).all()


@pytest.mark.parametrize(
    ("asr", "untriggered", "triggered", "target", "clean", "passes"),
    [
        (0.80, 0.02, 0.1, 0.5, 0.0, True),
        (0.79, 0.02, 0.1, 0.5, 0.0, False),
        (0.10, 0.02, 0.5, 0.5, 0.0, True),
        (0.10, 0.02, 0.49, 0.5, 0.0, False),
        (0.10, 0.10, 0.0, -0.1, 0.0, False),  # an encoder that cannot tell the target class from others
        (1.00, 1.00, 0.0, 0.5, 0.0, False),  # one that takes everything for it
    ],
)
def test_the_gate_on_the_surrogate(
    asr: float, untriggered: float, triggered: float, target: float, clean: float, passes: bool
) -> None:
    metrics = {"asr": Metric(value=asr, n=100), "untriggered_rate": Metric(value=untriggered, n=100)}
    near = {"triggered": triggered, "target": target, "clean": clean}
    assert works(Reaction(near, {"linear": metrics})) == passes


def test_unlabeled_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs labeled images"):
        reactions(MEASURED.images, bank=BANK.without_labels())
