"""Clean fine-tuning: a backdoor gets weaker, nothing but the clean images is seen, zero epochs change nothing."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from blto.data.images import ImageSet
from blto.defenses import ssl_training
from blto.defenses.base import Conditions, repair_encoder
from blto.defenses.clean_fine_tuning import CleanFineTuning
from blto.defenses.ssl_training import fresh
from blto.errors import ConfigError, Diverged, InputRefused
from blto.models.encoder import Encoder, build_encoder
from blto.pretraining import METHODS
from blto.pretraining.loop import pretrain
from blto.registry import Registry
from tests.defenses.tampered import SMALL, alikeness, clean_images, same, victim
from tests.factories import TINY_METHODS, tiny_recipe

REGISTRY: Registry[Any] = Registry("defense", {"x": "blto.defenses.clean_fine_tuning:CleanFineTuning"})


def tuned(seed: int = 0, **changes: Any) -> Encoder:
    repair = CleanFineTuning(
        **{"images": 64, "epochs": 1, "batch_size": 32, "method": TINY_METHODS["simclr"], **changes}
    )
    return repair_encoder(repair, victim(), clean_images(), Conditions(seed))


def test_a_taught_backdoor_gets_weaker() -> None:
    assert alikeness(victim()) > 0.9
    repaired = tuned(images=256, epochs=8)
    assert alikeness(repaired) < 0.6
    assert not any(part.training for part in repaired.modules())


def test_zero_epochs_change_nothing_and_what_is_given_is_left_alone() -> None:
    before, modes = deepcopy(victim()), [part.training for part in victim().modules()]
    assert same(tuned(epochs=0), victim())
    assert not same(tuned(), victim())
    assert same(before, victim())
    assert [part.training for part in victim().modules()] == modes


def test_the_same_seed_gives_the_same_encoder_and_another_another() -> None:
    first = tuned()
    torch.rand(3)  # the global generator is none of its business
    assert same(first, tuned())
    assert not same(first, tuned(seed=1))


@pytest.mark.parametrize("method", ["byol", "moco"])
def test_any_method_of_the_registry_will_do(method: str) -> None:
    assert not same(tuned(method=TINY_METHODS[method]), tuned())


def test_batch_norm_learns_from_the_clean_images() -> None:
    name = "backbone.stem.1.running_mean"
    assert not torch.equal(tuned().state_dict()[name], victim().state_dict()[name])


def test_it_trains_on_the_images_that_it_was_shown_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    trained_on: list[ImageSet] = []

    def spy(images: ImageSet, *args: Any, **options: Any) -> Any:
        trained_on.append(images)
        return pretrain(images, *args, **options)

    monkeypatch.setattr(ssl_training, "pretrain", spy)
    tuned()
    (images,) = trained_on
    known = {image.tobytes() for image in clean_images().images}
    assert len(images) == len({image.tobytes() for image in images.images} & known) == 64
    assert images.labels is None


def test_more_images_a_step_than_there_are_means_all_of_them() -> None:
    assert same(tuned(batch_size=64), tuned(batch_size=1000))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"epochs": -1}, "epochs"), ({"lr": 0}, "lr"), ({"method": "x"}, "method.name"), ({"views": "x"}, "views.name")],
)
def test_bad_options_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        REGISTRY.build({"name": "x", **option})


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputRefused, match="256 images, and the defense needs 5000"):
        repair_encoder(CleanFineTuning(), victim(), clean_images(), Conditions())
    with pytest.raises(Diverged):
        tuned(lr=1e30)


def test_a_fresh_encoder_is_the_one_that_its_recipe_builds() -> None:
    trained = victim()
    assert same(fresh(trained, 7), build_encoder(SMALL, seed=7, image_size=16))
    assert not same(fresh(trained, 7), fresh(trained, 8))


def test_what_cannot_be_drawn_anew_is_refused() -> None:
    odd = build_encoder(SMALL, seed=0)
    odd.backbone.register_parameter("gate", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(InputRefused, match=r"weight backbone\.gate"):
        fresh(odd, 0)


def test_a_given_method_is_trained_in_place_and_leaves_no_checkpoint(tmp_path: Any) -> None:
    method = METHODS.build(TINY_METHODS["simclr"], deepcopy(victim()))
    found = pretrain(clean_images(), tiny_recipe(epochs=1, batch_size=64), seed=0, method=method, device="cpu")
    assert found.encoder is method.encoder
    assert not same(found.encoder, victim())
    with pytest.raises(ValueError, match="no folder"):
        pretrain(clean_images(), tiny_recipe(), seed=0, method=method, folder=tmp_path)
