"""The bi-level loop: its objective against hand-made features, what each step touches, determinism and resume."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blto.attacks import ATTACKS, bilevel, crafting
from blto.attacks.base import Surroundings, poison_with
from blto.attacks.bilevel import CLEAN_IMAGES, REFERENCE_IMAGES, BilevelOptimisation
from blto.attacks.blto import BLTO
from blto.attacks.objective import similarities
from blto.attacks.untrained_generator import fresh_generator_trigger
from blto.errors import ConfigError, Diverged, Interrupted, Mismatch
from blto.files import show
from blto.poisoning import AdditiveTrigger, Budget, GeneratorTrigger
from blto.poisoning.aim import whitening_basis
from blto.pretraining.spec import OptimizerSpec
from tests.factories import random_images, tiny_bilevel

IMAGES = random_images(40)
GENERATOR = {"name": "unet", "width": 4}


def optimisation(*, frozen: bool = False, **changes: object) -> BilevelOptimisation:
    trigger = fresh_generator_trigger(GENERATOR, 8 / 255, "residual", seed=0)
    return BilevelOptimisation(
        trigger, IMAGES, tiny_bilevel(**changes), target_class=1, poison_rate=0.1, seed=0, frozen=frozen
    )


def parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def unchanged(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before, strict=True))


def test_the_objective_on_features_made_by_hand() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    references, clean = north.repeat(4, 1), east.repeat(4, 1)
    halfway = torch.tensor([1.0, 1.0]).repeat(4, 1)
    raw = similarities(halfway, references, clean, centred=False, centroid=True)
    assert raw.triggered == pytest.approx(2**-0.5)
    assert raw.clean == pytest.approx(0)
    assert raw.target == pytest.approx(1)
    pairwise = similarities(halfway, references, clean, centred=False, centroid=False)
    assert pairwise.triggered == pytest.approx(2**-0.5)
    shifted = [f + 100 * east for f in (halfway, references, clean)]
    hidden = similarities(*shifted, centred=False, centroid=True)
    assert hidden.clean > 0.99  # a shared direction hides everything from the raw cosine
    seen = similarities(*shifted, centred=True, centroid=True)
    assert seen.clean == pytest.approx(0, abs=1e-3)
    assert seen.triggered > 0.7


def test_an_aim_taken_once_is_that_of_each_step_where_the_features_are_the_same() -> None:
    """For whitened features; the formula is written out here."""
    run = optimisation()
    run.estimate(7)
    assert run.aim is not None
    assert run.basis is not None
    clean = run._sample("basis", 7, np.arange(len(IMAGES)), CLEAN_IMAGES)
    references = run._sample("aim", 7, run.references, REFERENCE_IMAGES)
    assert len(clean) == 40
    assert len(references) == 10
    triggered = torch.rand_like(clean)
    once = run.aim.similarities(triggered, run.basis)
    each = similarities(triggered, references, clean, centred=True, centroid=True, basis=run.basis)
    centre = (clean @ run.basis).mean(dim=0)
    sides = [torch.nn.functional.normalize(f @ run.basis - centre, dim=1) for f in (triggered, clean, references)]
    goal = sides[2].mean(dim=0) / sides[2].mean(dim=0).norm()
    for found in (once, each):
        values = [float(value) for value in (found.triggered, found.clean, found.target)]
        assert values == pytest.approx([float((side @ goal).mean()) for side in sides], abs=1e-6)


def test_the_aim_and_its_yardsticks_are_those_of_the_last_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilevel, "OUTER_STEPS_PER_ESTIMATE", 3)
    run = optimisation(rounds=8, reinitialise_every=4)
    run.step()  # makes the first surrogate
    embedded: list[int] = []
    run.surrogate.method.encoder.register_forward_pre_hook(lambda _, given: embedded.append(len(given[0])))
    rows, aims, sizes = [], [], []
    while run.period == 0 and run.outer_steps < 4:
        embedded.clear()
        if (found := run.step()) is not None:
            rows.append((float(found.clean), float(found.target)))
            aims.append(run.aim)
            sizes.append(list(embedded))
    assert sizes == [[40, 10, 8], [8], [8], [40, 10, 8]], "between estimates the triggered views alone are embedded"
    assert rows[0] == rows[1] == rows[2] != rows[3]
    assert aims[0] is aims[1] is aims[2] is not aims[3]
    run.step()
    while not run.place().is_outer:
        run.step()
    run.step()
    assert run.aim is not aims[3], "the second surrogate was met with the aim of the first"


@pytest.mark.parametrize("changes", [{"target": "pairwise"}, {"batch_norm": "batch"}])
def test_each_step_brings_its_own_references_where_the_formula_wants_them(changes: dict[str, Any]) -> None:
    run = optimisation(**changes)
    rows = []
    while run.outer_steps < 2:
        if (found := run.step()) is not None:
            rows.append((float(found.clean), float(found.target)))
    assert run.aim is None
    assert run.basis is not None
    assert rows[0] != rows[1]


def test_only_the_triggered_side_carries_a_gradient() -> None:
    sides = [torch.rand(4, 3, requires_grad=True) for _ in range(3)]
    similarities(*sides, centred=True, centroid=True).triggered.backward()  # type: ignore[no-untyped-call]
    assert sides[0].grad is not None
    assert sides[1].grad is None
    assert sides[2].grad is None


def test_an_inner_step_moves_the_surrogate_alone_and_refreshes_its_poisons() -> None:
    run = optimisation()
    trigger, surrogate = parameters(run.trigger), parameters(run.surrogate.method)
    for _ in range(5):  # one epoch: every poison is met
        run.inner_step()
    assert unchanged(run.trigger, trigger)
    assert not unchanged(run.surrogate.method, surrogate)
    differs = (run.surrogate_images != IMAGES.images).any(axis=(1, 2, 3))
    assert np.array_equal(differs, run.is_poisoned)
    assert run.is_poisoned.sum() == 4
    assert IMAGES.labels is not None
    assert (IMAGES.labels[run.is_poisoned] == 1).all()
    distance = np.abs(run.surrogate_images.astype(int) - IMAGES.images).max()
    assert distance <= 8


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
@pytest.mark.parametrize("layer", ["features", "embeddings"])
def test_an_outer_step_moves_the_trigger_alone(batch_norm: str, layer: str) -> None:
    run = optimisation(batch_norm=batch_norm, feature_layer=layer)
    trigger, surrogate = parameters(run.trigger), parameters(run.surrogate.method)
    run.outer_step(0, 1e-3)
    assert not unchanged(run.trigger, trigger)
    assert unchanged(run.surrogate.method, surrogate), "weights or batch-norm statistics of the surrogate moved"
    assert all(p.grad is None for p in run.surrogate.method.parameters())


def test_steps_alternate_and_the_surrogate_starts_anew_each_period() -> None:
    run = optimisation(rounds=5, inner_steps=2, outer_steps=1, reinitialise_every=3, warm_start_steps=1)
    kinds, surrogates, outer = "", [], []
    while run.position < run.total_steps:
        before = run.surrogate.step, run.outer_steps
        found = run.step()
        kinds += "i" if found is None else "o"
        assert (found is None) == (run.outer_steps == before[1])
        surrogates.append(id(run.surrogate))
        outer.append(run.optimizer.param_groups[0]["lr"])
        assert run.surrogate.total_steps == 1 + 3 * 2
    assert kinds == "i" + 3 * "iio" + "i" + 2 * "iio"
    assert len(set(surrogates)) == 2
    assert surrogates[9] == surrogates[0] != surrogates[10]
    rates = [rate for kind, rate in zip(kinds, outer, strict=True) if kind == "o"]
    peak = run.spec.outer_lr
    assert rates == pytest.approx([peak, 0.75 * peak, 0.25 * peak, peak, 0.5 * peak])  # half a cosine each period


def test_outer_steps_may_have_views_of_their_own_and_the_surrogate_keeps_its_own() -> None:
    def similarity_and_surrogate(**changes: Any) -> tuple[float, torch.Tensor]:
        run = optimisation(inner_steps=2, outer_steps=1, **changes)
        while (found := run.step()) is None:
            pass
        return float(found.triggered), next(run.surrogate.method.encoder.parameters()).detach().clone()

    default, weights = similarity_and_surrogate()
    surrogates_own = optimisation().spec.surrogate.views
    assert similarity_and_surrogate(outer_views=surrogates_own)[0] == default
    milder, same_weights = similarity_and_surrogate(outer_views={"name": "simclr_cifar", "crop_scale": [0.9, 1.0]})
    assert milder != default
    assert torch.equal(weights, same_weights)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_outer_learning_rate_warms_up_over_a_sixth_of_the_period(frozen: bool) -> None:
    run = optimisation(rounds=4, outer_steps=3, reinitialise_every=4, frozen=frozen)
    rates = []
    while run.position < run.total_steps:
        if run.step() is not None:
            rates.append(run.optimizer.param_groups[0]["lr"] / run.spec.outer_lr)
    assert len(rates) == 12
    assert rates[:3] == pytest.approx([0.5, 1, 1])  # two steps of warm-up, then the cosine from its top
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.05


def test_a_surrogate_with_nan_is_named() -> None:
    run = optimisation(similarity="whitened")
    while not run.place().is_outer:
        run.step()
    with torch.no_grad():
        next(run.surrogate.method.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(Diverged, match=r"surrogate's features hold NaN or Inf at step 2 of 14"):
        run.step()


@pytest.mark.parametrize("similarity", ["raw", "whitened"])
@pytest.mark.parametrize(
    "changes", [{"inner_steps": 60, "rounds": 1}, {"inner_steps": 12, "rounds": 6, "reinitialise_every": 1}]
)
def test_the_first_bad_step_of_the_surrogate_is_named(changes: dict[str, int], similarity: str) -> None:
    """Also where no row of the trajectory comes before 50 steps, and where a new surrogate is about to start."""
    spec = tiny_bilevel(**changes, similarity=similarity)
    recipe = spec.surrogate.model_copy(update={"optimizer": OptimizerSpec(lr=1e20)})
    attack = BLTO(
        target_class=1,
        poison_rate=0.1,
        generator=GENERATOR,
        bilevel=spec.model_copy(update={"surrogate": recipe}),
    )
    with pytest.raises(Diverged, match=r"surrogate 0 became NaN or Inf at its step [1234] of \d+; there is no"):
        attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings())


def test_where_crafting_diverges_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    kept = crafting._Kept(optimisation(), tmp_path, "identity")
    kept.save()
    with pytest.raises(
        Diverged, match=r"similarity became NaN or Inf by step 0 of \d+; the last good .* Lower outer_lr"
    ):
        kept.check(float("nan"))
    kept.run.surrogate.first_bad_step = torch.tensor(3)
    with pytest.raises(Diverged, match=re.escape(f"checkpoint is {show(tmp_path / crafting.CHECKPOINT, 100)}. Lower")):
        kept.check()


def test_the_surrogates_flag_is_read_every_fifty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred inner steps come before the first outer one."""
    run = optimisation(inner_steps=100, rounds=1, similarity="raw")
    monkeypatch.setattr(crafting, "BilevelOptimisation", lambda *_, **__: run)
    recipe = run.spec.surrogate.model_copy(update={"optimizer": OptimizerSpec(lr=1e20)})
    run.spec = run.spec.model_copy(update={"surrogate": recipe})
    with pytest.raises(Diverged):
        crafting.optimise_trigger(
            run.trigger, IMAGES, run.spec, target_class=1, poison_rate=0.1, seed=0, surroundings=Surroundings()
        )
    assert run.position == 50


def test_one_delta_for_all_images_stays_where_it_has_a_gradient() -> None:
    delta = AdditiveTrigger(torch.full((3, 16, 16), 0.03), Budget(8 / 255))
    run = BilevelOptimisation(
        delta, IMAGES, tiny_bilevel(similarity="raw"), target_class=1, poison_rate=0.1, seed=0, frozen=True
    )
    for number in range(10):
        run.outer_step(number, 1e-2)
    assert delta.delta.abs().max() <= 8 / 255 + 1e-7
    assert delta.delta.abs().max() > 7 / 255


def test_a_frozen_surrogate_is_trained_once_on_clean_images() -> None:
    frozen = optimisation(frozen=True, rounds=6)
    while frozen.outer_steps < 1:
        frozen.step()
    surrogate = parameters(frozen.surrogate.method)
    assert frozen.surrogate.step == 4  # warm start and one period
    while frozen.position < frozen.total_steps:
        frozen.step()
    assert frozen.outer_steps == 6 * frozen.spec.outer_steps
    assert unchanged(frozen.surrogate.method, surrogate)
    assert not frozen.is_poisoned.any()


def test_outer_steps_raise_the_similarity_on_a_frozen_surrogate() -> None:
    """Positive control of the outer problem: on one draw of images and views, a large budget reaches the target."""
    trigger = fresh_generator_trigger({"name": "unet", "width": 8}, 0.5, "residual", seed=0)
    spec = tiny_bilevel(outer_batch_size=16, similarity="raw", warm_start_steps=20)
    run = BilevelOptimisation(trigger, IMAGES, spec, target_class=1, poison_rate=0.1, seed=0, frozen=True)
    while run.outer_steps < 1:
        run.step()
    found = [run.outer_step(0, 3e-3) for _ in range(40)]
    start, end = float(found[0].triggered), float(found[-1].triggered)
    assert end > start + 0.05
    assert end > float(found[-1].clean) + 0.05


def test_the_trigger_does_not_get_stuck_at_its_bounds() -> None:
    """However far it is pushed, it can be pushed back."""
    trigger = fresh_generator_trigger({"name": "unet", "width": 8}, 8 / 255, "residual", seed=0)
    images = torch.rand(16, 3, 16, 16)
    optimizer = torch.optim.Adam(trigger.parameters(), lr=1e-2)
    for sign in (1, -1):  # everything to the upper bound, then everything to the lower
        for _ in range(60):
            optimizer.zero_grad()
            loss = -sign * trigger.candidate(images).mean()
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships it so
            optimizer.step()
        shift = (trigger.candidate(images) - images).mean() * 255 / 8
        assert sign * shift > 0.8


def test_whitening_evens_out_the_directions_and_finds_the_discriminant() -> None:
    torch.manual_seed(0)
    shared = torch.randn(4000, 1) * torch.tensor([10.0, 0.0])  # varies most, and says nothing of the class
    features = shared + 0.5 * torch.randn(4000, 2)
    basis = whitening_basis(features, 1e-6)
    torch.testing.assert_close(torch.cov((features @ basis).T), torch.eye(2), atol=1e-3, rtol=0)
    references = features[:2000] + torch.tensor([10.0, 3.0])
    sides = features[2000:] + torch.tensor([10.0, 0.0]), references, features[2000:]
    plain = similarities(*sides, centred=True, centroid=True)
    white = similarities(*sides, centred=True, centroid=True, basis=basis)
    assert plain.triggered > 0.8 * plain.target  # moved along the shared direction alone, and yet it seems near
    assert white.triggered < 0.3 * white.target
    almost_none = whitening_basis(features, 1e9)
    weak = similarities(*sides, centred=True, centroid=True, basis=almost_none)
    assert weak.triggered == pytest.approx(float(plain.triggered), abs=1e-3)


def test_whitening_follows_the_surrogate_and_survives_fewer_images_than_dimensions() -> None:
    run = optimisation(similarity="whitened")
    while run.outer_steps < 1:
        run.step()
    assert run.basis is not None
    assert run.basis.shape == (run.surrogate.method.encoder.feature_dim,) * 2
    assert torch.isfinite(run.basis).all()
    first = run.basis
    while run.period == 0:
        run.step()
    while run.outer_steps < 4:  # the first outer step of the second period, long before the fiftieth
        run.step()
    assert not torch.equal(run.basis, first), "the second surrogate was met with the whitening of the first"
    centred = optimisation(similarity="centred")
    while centred.outer_steps < 1:
        centred.step()
    assert centred.basis is None


def test_the_same_seed_gives_the_same_trigger() -> None:
    attack = BLTO(target_class=1, poison_rate=0.1, generator=GENERATOR, bilevel=tiny_bilevel())
    first, second = (attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings()) for _ in range(2))
    assert first.trigger.identity == second.trigger.identity
    assert first.trajectory == second.trajectory
    other = attack.train_trigger(IMAGES, seed=1, surroundings=Surroundings())
    assert other.trigger.identity != first.trigger.identity


def interrupted(attack: BLTO, steps: int, surroundings: Surroundings) -> Interrupted:
    """What crafting raises when SIGTERM comes within its step number `steps`."""
    original = BilevelOptimisation.step

    def stopping(self: BilevelOptimisation) -> object:
        if self.position == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BilevelOptimisation, "step", stopping)
        with pytest.raises(Interrupted) as caught:
            attack.train_trigger(IMAGES, seed=0, surroundings=surroundings)
    return caught.value


@pytest.mark.parametrize("steps", [1, 3, 9, 17, 18])  # warm start, inner, outer; last of a period, first of the next
@pytest.mark.parametrize("similarity", ["whitened", "raw"])
@pytest.mark.parametrize(
    "generator", [GENERATOR, {"name": "resnet", "width": 4, "blocks": 1}]
)  # the latter has dropout
def test_crafting_resumes_bit_for_bit(
    tmp_path: Path, steps: int, similarity: str, generator: dict[str, object]
) -> None:
    spec = tiny_bilevel(rounds=5, outer_steps=4, reinitialise_every=3, warm_start_steps=2, similarity=similarity)
    attack = BLTO(target_class=1, poison_rate=0.1, generator=generator, bilevel=spec)
    whole = attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings())
    caught = interrupted(attack, steps, Surroundings(folder=tmp_path))
    assert f"stopped at step {steps} of 29" in str(caught)
    assert caught.exit_code == 143
    resumed = attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings(folder=tmp_path, resume=True))
    assert resumed.trigger.identity == whole.trigger.identity
    assert resumed.trajectory == whole.trajectory
    assert [row["step"] for row in whole.trajectory] == [10, 20]


def test_crafting_for_a_victim_of_another_rate_goes_on_where_the_surrogates_rate_is_the_same(tmp_path: Path) -> None:
    spec = tiny_bilevel(inner_poison_rate=0.1)
    first, other = (BLTO(target_class=1, poison_rate=rate, generator=GENERATOR, bilevel=spec) for rate in (0.1, 0.2))
    whole = first.train_trigger(IMAGES, seed=0, surroundings=Surroundings())
    interrupted(first, 5, Surroundings(folder=tmp_path))
    resumed = other.train_trigger(IMAGES, seed=0, surroundings=Surroundings(folder=tmp_path, resume=True))
    assert resumed.trigger.identity == whole.trigger.identity
    inherits = BLTO(target_class=1, poison_rate=0.2, generator=GENERATOR, bilevel=tiny_bilevel())
    interrupted(first, 5, Surroundings(folder=tmp_path))
    with pytest.raises(Mismatch):
        inherits.train_trigger(IMAGES, seed=0, surroundings=Surroundings(folder=tmp_path, resume=True))


@pytest.mark.parametrize("name", ATTACKS.names())
def test_every_attack_keeps_its_budget_after_rounding(name: str) -> None:
    options: dict[str, object] = {"name": name, "target_class": 1}
    poisons = name not in {"clean", "bad_encoder"}
    if poisons:
        options["poison_rate"] = 0.1
    if name in {"blto", "universal_delta", "frozen_surrogate"}:
        options["bilevel"] = tiny_bilevel().model_dump(mode="json")
    if name in {"blto", "untrained_generator", "frozen_surrogate"}:
        options["generator"] = GENERATOR
    if name == "ctrl":
        options |= {"window": 16, "positions": [7, 15]}
    attack = ATTACKS.build(options)
    trained = attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings())
    unbounded = {"bad_encoder", "ctrl", "ssl_backdoor"}
    assert trained.trigger.budget.epsilon == {"clean": 0.0, **dict.fromkeys(unbounded, 1.0)}.get(name, 8 / 255)
    poisoned = poison_with(attack, trained.trigger, IMAGES, seed=0)
    assert poisoned.n_poisoned == (4 if poisons else 0)
    changed = (poisoned.poisoned.images != IMAGES.images).any(axis=(1, 2, 3))
    assert IMAGES.labels is not None
    assert (IMAGES.labels[changed] == 1).all()
    assert poisoned.epsilon_reached <= trained.trigger.budget.epsilon + 1e-9
    if poisons:
        assert changed.sum() == 4
        assert poisoned.epsilon_reached > 3 / 255


def test_a_generator_trigger_in_the_published_parametrisation() -> None:
    trigger = fresh_generator_trigger(GENERATOR, 8 / 255, "image", seed=0)
    assert isinstance(trigger, GeneratorTrigger)
    images = torch.rand(2, 3, 16, 16)
    expected = ((trigger.generator(images) + 1) / 2).clamp(images - 8 / 255, images + 8 / 255).clamp(0, 1)
    torch.testing.assert_close(trigger(images), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, "epsilon"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"poison_rate": 1.01}, "poison_rate"),
        ({"epsilom": 0.1}, "did you mean"),
        ({"bilevel": {"rounds": 0}}, "bilevel.rounds"),
        ({"generator": "unett"}, "did you mean"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ATTACKS.resolve({"name": "blto", "target_class": 0, **options})


def test_epsilon_may_be_a_fraction() -> None:
    assert ATTACKS.resolve({"name": "blto", "target_class": 0, "epsilon": "16/255"})["epsilon"] == 16 / 255
