"""Concealment: its direction and measure by hand, that it hides, and that a run with it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blto.attacks import ATTACKS
from blto.attacks.base import Surroundings
from blto.attacks.bilevel import BilevelOptimisation
from blto.attacks.blto import BLTO
from blto.attacks.concealment import SHRINKAGE, Concealment
from blto.attacks.untrained_generator import fresh_generator_trigger
from blto.errors import ConfigError
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


def test_without_it_nothing_is_measured_and_nothing_else_changes() -> None:
    gained, shift = run(0)
    assert shift == 0
    assert gained == pytest.approx(run(1e-9)[0], abs=1e-2)


@pytest.mark.parametrize("steps", [9, 17])
def test_a_concealed_crafting_resumes_bit_for_bit(tmp_path: Path, steps: int) -> None:
    spec = tiny_bilevel(rounds=5, outer_steps=4, reinitialise_every=3, warm_start_steps=2, conceal=0.1)
    attack = BLTO(target_class=1, poison_rate=0.1, generator=GENERATOR, bilevel=spec)
    whole = attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings())
    interrupted(attack, steps, Surroundings(folder=tmp_path))
    resumed = attack.train_trigger(IMAGES, seed=0, surroundings=Surroundings(folder=tmp_path, resume=True))
    assert resumed.trigger.identity == whole.trigger.identity
    assert resumed.trajectory == whole.trajectory
    assert all(row["shift"] > 0 for row in whole.trajectory)


def test_a_batch_s_own_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'conceal is 0.1 with batch_norm "batch"; give batch_norm "eval"'):
        ATTACKS.resolve({"name": "blto", "target_class": 0, "bilevel": {"conceal": 0.1, "batch_norm": "batch"}})


def test_runs_without_it_keep_their_names() -> None:
    attack = TINY_EXPERIMENT["attack"]
    specs = [
        ExperimentSpec.parse(
            {**TINY_EXPERIMENT, "attack": {**attack, "bilevel": {**attack["bilevel"], "conceal": conceal}}}
        )
        for conceal in (0.0, 0.1)
    ]
    assert specs[0].run_id == ExperimentSpec.parse(TINY_EXPERIMENT).run_id != specs[1].run_id
