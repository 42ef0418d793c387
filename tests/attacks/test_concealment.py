"""Concealment: its direction and measure by hand, that it hides, and that a run with it resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blto.attacks import ATTACKS
from blto.attacks.base import Surroundings, TrainedTrigger
from blto.attacks.bilevel import BilevelOptimisation
from blto.attacks.bilevel_spec import learned_from
from blto.attacks.blto import BLTO
from blto.attacks.concealment import SHRINKAGE, Concealment
from blto.attacks.untrained_generator import fresh_generator_trigger
from blto.errors import ConfigError, Diverged
from blto.experiment import ExperimentSpec
from tests.attacks.test_bilevel import GENERATOR, IMAGES, interrupted
from tests.factories import tiny_bilevel
from tests.tiny_experiment import TINY_EXPERIMENT


def test_the_direction_is_fisher_s_and_in_the_class_s_own_deviations() -> None:
    torch.manual_seed(0)
    own = torch.randn(5000, 2) * torch.tensor([10.0, 1.0])
    others, way = torch.randn(300, 2), torch.tensor([5.0, 5.0])
    found = Concealment.against(own, others, others + way)
    covariance = torch.cov(own.T)
    expected = torch.linalg.solve(covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(2), way)
    torch.testing.assert_close(found.direction, expected / (own @ expected).std())
    assert found.direction[1] > 2 * found.direction[0]  # where the class hardly varies
    up, down = own[:8] + torch.tensor([0.0, 3.0]), own[:8] - torch.tensor([0.0, 3.0])
    assert float(found.shift(own[:8], up)) == pytest.approx(float(3 * found.direction[1]))
    assert float(found.shift(own[:8], down)) == pytest.approx(float(found.shift(own[:8], up)))
    assert float(found.shift(own[:8], own[:8])) == 0


def run(conceal: float) -> tuple[float, float]:
    """Where forty outer steps on one surrogate and one draw end: (similarity gained, shift of the class's own)."""
    trigger = fresh_generator_trigger({"name": "unet", "width": 8}, 0.5, "residual", seed=0)
    spec = tiny_bilevel(outer_batch_size=16, similarity="raw", warm_start_steps=20, conceal=conceal)
    found = BilevelOptimisation(trigger, IMAGES, spec, target_class=1, poison_rate=0.1, seed=0, frozen=True)
    while found.outer_steps < 1:
        found.step()
    first = found.outer_step(0, 3e-3)
    for _ in range(40):
        last = found.outer_step(0, 3e-3)
    return float(last.triggered - first.triggered), float(found.shift)


def test_what_is_paid_for_gets_less_and_the_trigger_still_leads_to_the_target() -> None:
    gained, shift = run(1e-6)  # as good as nothing, and measured
    hidden_gain, hidden_shift = run(0.05)
    assert hidden_shift < 0.6 * shift
    assert gained > 0.05
    assert hidden_gain > 0.02


@pytest.mark.parametrize("target", ["centroid", "pairwise"])
def test_what_costs_nothing_changes_nothing(target: str) -> None:
    """No draw of the objective moves where poisons are concealed."""

    def crafted(conceal: float) -> TrainedTrigger:
        bilevel = tiny_bilevel(rounds=12, conceal=conceal, target=target)
        attack = BLTO(target_class=1, poison_rate=0.1, generator=GENERATOR, bilevel=bilevel)
        return attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings())

    without, with_it = crafted(0), crafted(1e-30)
    assert without.trigger.identity == with_it.trigger.identity
    assert "shift" not in without.trajectory[0]
    assert with_it.trajectory[0]["shift"] > 0


def test_the_penalty_leaves_the_statistics_of_a_generator_alone() -> None:
    """Poisons are made with running statistics; those of the class's own images alone would shift them."""
    spec = tiny_bilevel(conceal=0.1)
    trigger = fresh_generator_trigger({"name": "resnet", "width": 4, "blocks": 1}, 8 / 255, "residual", seed=0)
    found = BilevelOptimisation(trigger, IMAGES, spec, target_class=1, poison_rate=0.1, seed=0)
    trigger.train()
    before = {name: value.clone() for name, value in trigger.state_dict().items() if "running" in name}
    clean, triggered = found._without_and_with("concealed views", 0, found.references[:4])
    assert before
    assert all(torch.equal(value, trigger.state_dict()[name]) for name, value in before.items())
    assert triggered.requires_grad
    assert not clean.requires_grad


def test_a_class_without_others_to_hide_among_is_refused() -> None:
    alone = IMAGES.subset(np.r_[np.flatnonzero(IMAGES.labels == 1)[:1], np.flatnonzero(IMAGES.labels != 1)])
    attack = BLTO(target_class=1, poison_rate=0.02, generator=GENERATOR, bilevel=tiny_bilevel(conceal=0.1))
    with pytest.raises(ConfigError, match=r"conceal: .* has 1 images of the target class"):
        attack.train_trigger(alone, seed=0, surroundings=Surroundings())


def test_a_displacement_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trigger = fresh_generator_trigger(GENERATOR, 8 / 255, "residual", seed=0)
    found = BilevelOptimisation(trigger, IMAGES, tiny_bilevel(conceal=0.1), target_class=1, poison_rate=0.1, seed=0)
    bad = torch.full((2, found.surrogate.method.encoder.feature_dim), torch.nan)
    monkeypatch.setattr(found, "_without_and_with", lambda *_: (bad, bad))
    with pytest.raises(Diverged, match="features hold NaN or Inf"):
        found.estimate(0)


@pytest.mark.parametrize("steps", [9, 17])
@pytest.mark.parametrize("generator", [GENERATOR, {"name": "resnet", "width": 4, "blocks": 1}])
def test_a_concealed_crafting_resumes_bit_for_bit(tmp_path: Path, steps: int, generator: dict[str, object]) -> None:
    spec = tiny_bilevel(rounds=5, outer_steps=4, reinitialise_every=3, warm_start_steps=2, conceal=0.1)
    attack = BLTO(target_class=1, poison_rate=0.1, generator=generator, bilevel=spec)
    whole = attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings())
    interrupted(attack, steps, Surroundings(folder=tmp_path))
    resumed = attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings(folder=tmp_path, resume=True))
    assert resumed.trigger.identity == whole.trigger.identity
    assert resumed.trajectory == whole.trajectory
    assert all(row["shift"] > 0 for row in whole.trajectory)


def test_a_batch_s_own_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'conceal is 0.1 with batch_norm "batch"; give batch_norm "eval"'):
        ATTACKS.resolve({"name": "blto", "target_class": 0, "bilevel": {"conceal": 0.1, "batch_norm": "batch"}})


def test_without_it_neither_runs_nor_triggers_change_their_names() -> None:
    attack = TINY_EXPERIMENT["attack"]
    plain, concealed = (
        ExperimentSpec.parse(
            {**TINY_EXPERIMENT, "attack": {**attack, "bilevel": {**attack["bilevel"], "conceal": conceal}}}
        )
        for conceal in (0.0, 0.1)
    )
    assert "conceal" not in plain.model_dump(mode="json")["attack"]["bilevel"]
    assert "conceal" not in learned_from(plain.attack)["bilevel"]
    assert learned_from(concealed.attack)["bilevel"]["conceal"] == 0.1
    assert plain.run_id == ExperimentSpec.parse(TINY_EXPERIMENT).run_id != concealed.run_id
