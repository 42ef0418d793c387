"""Learning a trigger to its end: the bi-level loop with its progress, its trajectory, its log and its checkpoints."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from blto.attacks.base import Surroundings
from blto.attacks.bilevel import BilevelOptimisation
from blto.attacks.bilevel_spec import BilevelSpec, surrogate_poison_rate
from blto.attacks.concealment import Concealment
from blto.data.images import ImageSet
from blto.data.order import ORDER
from blto.errors import Diverged, Interrupted
from blto.files import append_jsonl, canonical_json, sha256_bytes
from blto.models.checkpoints import save_encoder
from blto.poisoning import Trigger
from blto.poisoning.aim import Aim, Similarities
from blto.pretraining import checkpoint
from blto.runtime.interrupts import stop_requests
from blto.runtime.seeds import seeded, stream_seed

CHECKPOINT = "crafting_checkpoint.safetensors"
SURROGATE = "surrogate.safetensors"
"""The encoder of the last surrogate, which stays."""
SECONDS_BETWEEN_CHECKPOINTS = 60.0
STEPS_BETWEEN_CHECKS = 50
"""Steps, inner and outer, after which the surrogate's NaN flag is read from the device."""
STEPS_BETWEEN_ROWS = 10
"""Outer steps after which the trajectory gets a row; the state may be saved as often."""

FACTS = ("position", "outer_steps", "period", "trajectory")
"""Of a run, what a checkpoint keeps beside tensors."""


def optimise_trigger(
    trigger: Trigger,
    images: ImageSet,
    spec: BilevelSpec,
    *,
    target_class: int,
    poison_rate: float,
    seed: int,
    surroundings: Surroundings,
    frozen: bool = False,
) -> list[dict[str, float]]:
    """Run the whole loop, resumably; trains `trigger` in place and returns its trajectory.

    Each row: `step` (outer steps done), `period` (which surrogate, from 0), and `trigger`, `clean` and `target`: the
    mean cosine to the target on the surrogate; of that step's views, or, for the latter two and a target "centroid", of
    the last estimate's. `shift`, where poisons are concealed: see `Concealment.shift`.

    Raises:
        ConfigError: a target class or poison rate that the data do not have.
        Diverged: the surrogate's loss or the similarity became NaN or Inf.
        Interrupted: Ctrl-C or SIGTERM; the state is saved if there is a folder.
    """
    run = BilevelOptimisation(
        trigger,
        images,
        spec,
        target_class=target_class,
        poison_rate=poison_rate,
        seed=seed,
        device=surroundings.device,
        frozen=frozen,
    )
    inner_rate = surrogate_poison_rate(spec.inner_poison_rate, poison_rate)
    inputs = [
        {**spec.model_dump(mode="json"), "inner_poison_rate": inner_rate},
        trigger.spec(),
        target_class,
        seed,
        frozen,
        images.content_hash,
        run.surrogate.arithmetic,
        ORDER,
    ]
    kept = _Kept(run, surroundings.folder, sha256_bytes(canonical_json(inputs)))
    bar = surroundings.progress.bar("learn the trigger", run.total_steps)
    with seeded(stream_seed(seed, "trigger", "dropout")), bar as advance, stop_requests() as stop:
        if surroundings.resume:
            kept.restore()
        shown = "surrogate training"
        while run.position < run.total_steps:
            shown = kept.note(kept.step()) or shown
            if run.position % STEPS_BETWEEN_ROWS == 0 or run.position == run.total_steps:
                advance(run.position, shown)
            if stop:
                kept.save()
                went_on = "run the same command with --resume" if surroundings.folder else "nothing was kept"
                raise Interrupted(
                    f"stopped at step {run.position} of {run.total_steps}; {went_on}.",
                    signal_number=stop.signal_number,
                )
    trigger.eval()
    if surroundings.folder:
        last = run.surrogate.method.encoder
        save_encoder(surroundings.folder / SURROGATE, last, spec.surrogate.backbone, images.image_size)
    return run.trajectory


class _Kept:
    """What outlives the process: the trajectory, the log and the checkpoint."""

    def __init__(self, run: BilevelOptimisation, folder: Path | None, identity: str) -> None:
        self.run, self.folder, self.identity = run, folder, identity
        self._saved_at = time.monotonic()

    def step(self) -> Similarities | None:
        """The run's next step; what it does not survive is told by the surrogate's first bad one."""
        if self.run.position and self.run.place().starts:
            self.check()
        try:
            return self.run.step()
        except Diverged:
            self.check()
            raise

    def note(self, found: Similarities | None) -> str:
        """After a step: save where it is time, every fifty steps look for NaN, every ten outer ones add a row.

        Returns:
            The row in words, or nothing.
        """
        run, words = self.run, ""
        if run.position % STEPS_BETWEEN_CHECKS == 0:
            self.check()
        if found is not None and (run.outer_steps % STEPS_BETWEEN_ROWS == 0 or run.position == run.total_steps):
            near = {"trigger": float(found.triggered), "clean": float(found.clean), "target": float(found.target)}
            self.check(near["trigger"])
            row = {"step": float(run.outer_steps), "period": float(run.period), **near}
            if run.concealment is not None:
                row["shift"] = float(run.shift)
            run.trajectory.append(row)
            if self.folder:
                append_jsonl(self.folder / "log.jsonl", {"event": "crafting", **row})
            words = "similarity to the target: " + " ".join(f"{name} {value:.2f}" for name, value in near.items())
        if time.monotonic() - self._saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            self.save()
        return words

    def check(self, similarity: float = 0.0) -> None:
        """Raises Diverged, with the first bad step, where the surrogate's flag is set or the similarity not finite."""
        run, kept = self.run, checkpoint.last_good(self.folder and self.folder / CHECKPOINT)
        bad = int(run.surrogate.first_bad_step)
        if bad >= 0:
            raise Diverged(
                f"the loss of surrogate {run.period} became NaN or Inf at its step {bad} of "
                f"{run.surrogate.total_steps}; {kept}. Lower surrogate.optimizer.lr "
                f"(now {run.spec.surrogate.optimizer.lr:g}), or give precision fp32."
            )
        if not math.isfinite(similarity):
            raise Diverged(
                f"the trigger's similarity became NaN or Inf by step {run.position} of {run.total_steps}; "
                f"{kept}. Lower outer_lr (now {run.spec.outer_lr:g})."
            )

    def save(self) -> None:
        """Write the checkpoint; a state with NaN in it never becomes one."""
        self.check()
        if self.folder:
            run = self.run
            state = {
                **checkpoint.prefixed("trigger", run.trigger.state_dict()),
                **checkpoint.prefixed("outer", checkpoint.optimizer_state(run.optimizer)),
                **checkpoint.prefixed("surrogate", checkpoint.trainer_state(run.surrogate)),
                "surrogate_images": torch.from_numpy(run.surrogate_images[run.is_poisoned]),
            }
            if run.basis is not None:
                state["basis"] = run.basis
            if run.aim is not None:
                state |= checkpoint.prefixed("aim", run.aim._asdict())
            if run.concealment is not None:
                state |= checkpoint.prefixed("concealment", run.concealment._asdict())
            facts = {key: getattr(run, key) for key in FACTS}
            checkpoint.save_checkpoint(self.folder / CHECKPOINT, state, identity=self.identity, facts=facts)
        self._saved_at = time.monotonic()

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.folder and (self.folder / CHECKPOINT).exists():
            run = self.run
            state, facts = checkpoint.load_checkpoint(self.folder / CHECKPOINT, identity=self.identity)
            run.trigger.load_state_dict(checkpoint.without_prefix("trigger", state))
            checkpoint.restore_optimizer(run.optimizer, checkpoint.without_prefix("outer", state))
            for key in FACTS:
                setattr(run, key, facts[key])
            run.surrogate = run.new_surrogate(run.period)
            device = run.surrogate.fabric.device
            if "basis" in state:
                run.basis = state["basis"].to(device)
            if aim := checkpoint.without_prefix("aim", state):
                run.aim = Aim(**{name: tensor.to(device) for name, tensor in aim.items()})
            if concealment := checkpoint.without_prefix("concealment", state):
                run.concealment = Concealment(**{name: tensor.to(device) for name, tensor in concealment.items()})
            checkpoint.restore_trainer(run.surrogate, checkpoint.without_prefix("surrogate", state))
            run.surrogate_images[run.is_poisoned] = state["surrogate_images"].numpy()
