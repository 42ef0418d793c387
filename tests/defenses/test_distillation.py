"""Distillation: the student matches the teacher, is drawn anew, sees clean images alone, and gets no backdoor."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from blto.data.images import ImageSet
from blto.defenses import ssl_training
from blto.defenses.base import Conditions, repair_encoder
from blto.defenses.distillation import Distillation, SimilarityMatching, mismatch
from blto.errors import ConfigError, Diverged, InputRefused
from blto.evaluation.features import extract
from blto.models.encoder import Encoder, build_encoder
from blto.pretraining.loop import pretrain
from blto.registry import Registry
from tests.defenses.tampered import SMALL, alikeness, clean_images, same, settle, victim

REGISTRY: Registry[Any] = Registry("defense", {"x": "blto.defenses.distillation:Distillation"})


def student(seed: int = 0, **changes: Any) -> Encoder:
    repair = Distillation(**{"images": 64, "epochs": 1, "batch_size": 32, "queue": 128, **changes})
    return repair_encoder(repair, victim(), clean_images(), Conditions(seed))


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_loss_is_the_divergence_of_the_two_distributions() -> None:
    goal, own, goal_anchors, own_anchors = (unit(n, 6, seed=n) for n in (3, 3, 8, 8))
    own, own_anchors = unit(3, 6, seed=1), unit(8, 6, seed=2)
    p = softmax((goal @ goal_anchors.T).double().numpy() / 0.1, axis=1)
    q = softmax((own @ own_anchors.T).double().numpy() / 0.1, axis=1)
    expected = float((p * np.log(p / q)).sum(axis=1).mean())
    assert float(mismatch(goal, own, goal_anchors, own_anchors, 0.1)) == pytest.approx(expected, rel=1e-4)
    assert float(mismatch(goal, goal, goal_anchors, goal_anchors, 0.1)) == pytest.approx(0, abs=1e-6)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(4)))[0]
    same_up_to_rotation = mismatch(goal, goal @ turned, goal_anchors, goal_anchors @ turned, 0.1)
    assert float(same_up_to_rotation) == pytest.approx(0, abs=1e-5), "only similarities count"


def test_anchors_are_the_last_views_of_both_and_the_teacher_stays_as_it_was() -> None:
    teacher = deepcopy(victim()).requires_grad_(True)
    method = SimilarityMatching(build_encoder(SMALL, seed=3, image_size=16), teacher, queue=6, temperature=0.1).train()
    assert torch.equal(*method.anchors.chunk(2, dim=1))
    views = [torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)]
    method.losses(views)["loss"].backward()  # type: ignore[no-untyped-call]
    method.after_step(1.0)
    with torch.no_grad():
        expected = F.normalize(victim()(torch.cat(views)), dim=1)
    assert torch.allclose(method.anchors[:4, :64], expected, atol=1e-5)
    assert int(method.pointer) == 4
    assert same(teacher, victim())
    assert not teacher.training
    assert method.encoder.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())


def agreement(of: Encoder) -> float:
    """Correlation of its similarities between images, of those it was trained on, with the teacher's."""
    vectors = [F.normalize(extract(encoder, clean_images().images[:100]).vectors) for encoder in (of, victim())]
    return float(torch.stack([(each @ each.T).flatten() for each in vectors]).corrcoef()[0, 1])


def test_the_student_learns_the_teachers_similarities_and_not_its_backdoor() -> None:
    learned = student(images=256, epochs=10)
    untrained = build_encoder(SMALL, seed=3, image_size=16)
    settle(untrained, clean_images().images)
    assert agreement(learned) > agreement(untrained) + 0.05
    assert alikeness(victim()) > 0.9
    assert alikeness(learned) < 0.6
    assert not any(part.training for part in learned.modules())


def test_the_student_never_sees_a_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it is trained on are the clean images that were shown, and it holds no weight of the teacher."""
    trained_on: list[ImageSet] = []
    begins: list[Encoder] = []

    def spy(images: ImageSet, *args: Any, method: SimilarityMatching, **options: Any) -> Any:
        trained_on.append(images)
        begins.append(deepcopy(method.encoder))
        return pretrain(images, *args, method=method, **options)

    monkeypatch.setattr(ssl_training, "pretrain", spy)
    student()
    known = {image.tobytes() for image in clean_images().images}
    assert len({image.tobytes() for image in trained_on[0].images} & known) == len(trained_on[0]) == 64
    taught = dict(victim().named_parameters())
    convolutions = [name for name, value in taught.items() if value.ndim == 4]
    assert convolutions
    drawn = dict(begins[0].named_parameters())
    assert not any(torch.equal(taught[name], drawn[name]) for name in convolutions)
    assert all((drawn[name] == 1).all() for name in taught if name.endswith("bn1.weight"))


def test_what_is_given_is_left_alone_and_a_seed_decides() -> None:
    before, modes = deepcopy(victim()), [part.training for part in victim().modules()]
    first = student()
    torch.rand(3)
    assert same(first, student())
    assert not same(first, student(seed=1))
    assert same(before, victim())
    assert [part.training for part in victim().modules()] == modes
    assert all(parameter.requires_grad for parameter in victim().parameters())


def test_another_teacher_teaches_something_else() -> None:
    repair = Distillation(images=64, epochs=1, batch_size=32, queue=128)
    other = build_encoder(SMALL, seed=9, image_size=16).eval()
    assert not same(student(), repair_encoder(repair, other, clean_images(), Conditions(0)))


def test_bad_input_is_refused() -> None:
    for option, message in (({"epochs": 0}, "epochs"), ({"queue": 1}, "queue"), ({"temperature": 0}, "temperature")):
        with pytest.raises(ConfigError, match=message):
            REGISTRY.build({"name": "x", **option})
    with pytest.raises(InputRefused, match="no clean images"):
        repair_encoder(Distillation(), victim(), None, Conditions())
    with pytest.raises(Diverged):
        student(lr=1e30)
