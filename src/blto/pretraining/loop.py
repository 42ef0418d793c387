"""The one pretraining loop: images without labels in, a trained encoder out.

Batch order is a function of (seed, epoch) and augmentation of (seed, epoch, sample, view), so the loop's only state is
its checkpoint, and a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from blto.data.images import ImageSet, random_access
from blto.data.order import ORDER, Rows, permuted
from blto.data.view_source import view_source
from blto.errors import ConfigError, Diverged, Interrupted
from blto.files import append_jsonl, canonical_json, sha256_bytes
from blto.models.encoder import Encoder, build_encoder
from blto.pretraining import METHODS
from blto.pretraining.checkpoint import last_good, load_checkpoint, restore_trainer, save_checkpoint, trainer_state
from blto.pretraining.method import SSLMethod
from blto.pretraining.spec import PretrainingSpec, RecipeSpec
from blto.pretraining.trainer import Trainer, plain
from blto.runtime.distributed import any_process, process_count, process_number, share
from blto.runtime.interrupts import stop_requests
from blto.runtime.progress import SILENT, Progress
from blto.runtime.seeds import seeded, stream_seed

STEPS_BETWEEN_CHECKS = 50
"""How often the NaN flag and the loss are read from the device, and logged."""


class Observer(Protocol):
    """Follows a training from outside. It is handed the encoder in eval mode and without gradients."""

    def __call__(self, encoder: Encoder, epoch: int) -> Mapping[str, float]:
        """Values after `epoch` epochs, by name."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """What pretraining yields: the encoder (eval mode), and a row of loss and observed values per observed epoch."""

    encoder: Encoder
    trajectory: list[dict[str, float]] = field(default_factory=list)


def build_method(spec: RecipeSpec, *, seed: int, image_size: int) -> SSLMethod:
    """Encoder and heads of a recipe, initialised from `seed` alone."""
    encoder = build_encoder(spec.backbone, seed=seed, image_size=image_size, normalise=spec.normalise)
    with seeded(seed):
        return METHODS.build(spec.method, encoder)


def batch_rows(size: int, batch_size: int, *, seed: int, epoch: int, batch: int) -> Rows:
    """The sample numbers of one batch, int64 (batch_size,): a part of the epoch's order, a function of (seed, epoch).

    Args:
        size: of the set; an epoch has size // batch_size whole batches, and the remainder is left out.
        batch_size: images a batch.
        seed, epoch: which order.
        batch: which part of it, from 0.
    """
    key = stream_seed(seed, "pretrain", "order", epoch)
    return permuted(batch * batch_size, (batch + 1) * batch_size, size=size, key=key)


def observed_epochs(epochs: int, observations: int) -> frozenset[int]:
    """Evenly spaced epochs, the start (0) and the end among them, at most `observations` + 1."""
    points = min(observations, epochs)
    return frozenset(round(point * epochs / points) for point in range(points + 1)) if points else frozenset()


def observe(observers: Sequence[Observer], encoder: Encoder, epoch: int) -> dict[str, float]:
    """Ask every observer; whatever it does, no random number is drawn and batch norm stays as it was."""
    values: dict[str, float] = {}
    was_training = encoder.training
    encoder.eval()
    with plain(encoder), torch.inference_mode(), torch.random.fork_rng(devices=[]):
        for observer in observers:
            values.update(observer(encoder, epoch))
    encoder.train(was_training)
    return values


def pretrain(
    images: ImageSet,
    spec: PretrainingSpec,
    *,
    seed: int,
    device: str = "auto",
    folder: Path | None = None,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    observations: int = 20,
    checkpoint_seconds: float = 60.0,
    progress: Progress = SILENT,
    title: str = "pretrain",
    method: SSLMethod | None = None,
) -> Pretrained:
    """Train an encoder on unlabeled images.

    In a process group (`runtime.distributed`) every process calls this with the same arguments and gets the same
    encoder. Each takes its part of every batch. All read the checkpoint; only the first one writes, asks the observers
    and reports progress.

    Args:
        images: the training set; must carry no labels, so that a victim cannot even see one.
        spec: method, backbone, views, schedule.
        seed: of the run; weights, order and views are functions of it.
        device: "auto", "cpu" or "cuda".
        folder: where `checkpoint.safetensors` and `log.jsonl` go; None keeps nothing.
        resume: go on from the folder's checkpoint where there is one.
        observers: called at the start, at the end and between; their values make the trajectory.
        observations: how often after the start, at most; evenly spaced over the epochs.
        checkpoint_seconds: wall time between checkpoints; no result depends on it.
        progress, title: where progress goes, and under which name.
        method: what is trained, in place, instead of the fresh one that the spec's method and backbone describe. It
            takes no folder: a checkpoint could not tell where the training began.

    Raises:
        ValueError: the images carry labels, or a method comes with a folder.
        ConfigError: fewer images than one batch, or a batch that the processes cannot share.
        Diverged: the loss became NaN or Inf.
        Interrupted: Ctrl-C or SIGTERM; the state is saved if there is a folder.
        Mismatch: `resume` met a checkpoint of another recipe, seed, dataset or precision.
    """
    if images.labels is not None:
        raise ValueError("a victim sees no labels: pass images.without_labels()")
    if method is not None and folder is not None:
        raise ValueError("a method that is given leaves no checkpoints: pass no folder")
    if len(images) < spec.batch_size:
        raise ConfigError(
            f"batch_size is {spec.batch_size}, but there are {len(images)} training images; give at most that many."
        )
    alone, first = process_count() == 1, process_number() == 0
    if spec.batch_size % process_count():
        raise ConfigError(
            f"batch_size is {spec.batch_size}, which {process_count()} processes cannot share; give a multiple."
        )
    if spec.views.jitter_coin == "batch" and not alone:
        raise ConfigError('views.jitter_coin is "batch", which is for one process; give "sample", or start one.')
    if spec.method.get("i_cutmix") and not alone:
        raise ConfigError("method.i_cutmix is above 0, which is for one process; give 0, or start one.")
    run_seed = stream_seed(seed, "pretrain")
    steps_per_epoch = len(images) // spec.batch_size
    trainer = Trainer(
        method or build_method(spec, seed=run_seed, image_size=images.image_size),
        optimizer=spec.optimizer,
        total_steps=spec.epochs * steps_per_epoch,
        warmup_steps=round(spec.warmup_epochs * steps_per_epoch),
        seed=run_seed,
        device=device,
        precision=spec.precision,
        engine=spec.engine,
        cuda_graphs=True,
    )
    epochs = observed_epochs(spec.epochs, observations)
    run = _Run(images, spec, run_seed, trainer, folder, observers, epochs, checkpoint_seconds)
    bar = (progress if first else SILENT).bar(title, trainer.total_steps)
    with seeded(run_seed), random_access(images.images), bar as advance, stop_requests() as stop:
        if resume:
            run.restore()
        while trainer.step < trainer.total_steps:
            run.one_step(steps_per_epoch)
            at_check = trainer.step % STEPS_BETWEEN_CHECKS == 0 or trainer.step == trainer.total_steps
            if at_check:
                run.check_and_log()
                advance(trainer.step, f"loss {run.last_loss:.3f}")
            if (alone or at_check) and any_process(bool(stop), trainer.fabric.device):
                run.check()
                run.save()
                kept = "its state is saved; run the same command with --resume" if folder else "nothing was kept"
                raise Interrupted(
                    f"stopped at step {trainer.step} of {trainer.total_steps}; {kept}.",
                    signal_number=stop.signal_number,
                )
    run.save()
    trainer.method.encoder.native = False  # whoever extracts features says in which precision
    return Pretrained(trainer.method.encoder.eval(), run.trajectory)


class _Run:
    """The loop's state and its side effects: log, checkpoints, trajectory."""

    def __init__(
        self,
        images: ImageSet,
        spec: PretrainingSpec,
        seed: int,
        trainer: Trainer,
        folder: Path | None,
        observers: Sequence[Observer],
        observed: frozenset[int],
        checkpoint_seconds: float,
    ) -> None:
        self.images, self.spec, self.seed, self.trainer = images, spec, seed, trainer
        self.folder, self.observed = folder, observed
        self.observers = observers if process_number() == 0 else ()
        self.checkpoint_seconds = checkpoint_seconds
        self.draw_views = view_source(images.images, spec.views, trainer.fabric.device)
        self.writes = folder is not None and process_number() == 0
        self.trajectory: list[dict[str, float]] = []
        self.last_loss = float("nan")
        self._loss = torch.zeros(())
        self._saved_at = time.monotonic()
        inputs = {"spec": spec.model_dump(mode="json"), "seed": seed, "data": images.content_hash, "order": ORDER}
        inputs["arithmetic"] = trainer.arithmetic  # the machine that goes on may have another
        self.identity = sha256_bytes(canonical_json(inputs))

    @property
    def checkpoint(self) -> Path | None:
        return self.folder / "checkpoint.safetensors" if self.folder else None

    def one_step(self, steps_per_epoch: int) -> None:
        """Draw the batch of this step, train on it, and observe where an epoch begins or ends."""
        epoch, batch = divmod(self.trainer.step, steps_per_epoch)
        if self.trainer.step == 0:
            self._observe(0)
        rows = batch_rows(len(self.images), self.spec.batch_size, seed=self.seed, epoch=epoch, batch=batch)
        self._loss = self.trainer.train_step(self.draw_views(share(rows), seed=self.seed, epoch=epoch))["loss"]
        if batch == steps_per_epoch - 1:
            self._observe(epoch + 1)

    def _observe(self, epoch: int) -> None:
        if epoch in self.observed:
            self.check()  # before the observers keep anything of it
            values = observe(self.observers, self.trainer.method.encoder, epoch)
            loss = {"loss": float(self._loss)} if epoch else {}  # none has been computed at the start
            self.trajectory.append({"epoch": float(epoch), **loss, **values})
            self._log({"event": "observed", **self.trajectory[-1]})

    def check(self) -> None:
        """Read the flag. Raises Diverged with the first bad step."""
        bad = int(self.trainer.first_bad_step)
        if bad >= 0:
            raise Diverged(
                f"the loss became NaN or Inf at step {bad} of {self.trainer.total_steps}; "
                f"{last_good(self.checkpoint)}. Try a lower optimizer.lr (now {self.spec.optimizer.lr:g}), "
                "a longer warm-up, or precision fp32."
            )

    def check_and_log(self) -> None:
        """Read the flag and the loss; save where it is time."""
        self.check()
        self.last_loss = float(self._loss)
        self._log({"event": "step", "step": self.trainer.step, "loss": self.last_loss})
        if time.monotonic() - self._saved_at > self.checkpoint_seconds:
            self.save()

    def save(self) -> None:
        """Checkpoint, unless a bad step has been taken: the last good one must survive."""
        if self.checkpoint and self.writes and int(self.trainer.first_bad_step) < 0:
            state = trainer_state(self.trainer)
            save_checkpoint(self.checkpoint, state, identity=self.identity, facts=self.trajectory)
            self._saved_at = time.monotonic()

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.checkpoint and self.checkpoint.exists():
            state, self.trajectory = load_checkpoint(self.checkpoint, identity=self.identity)
            restore_trainer(self.trainer, state)
            self._log({"event": "resumed", "step": self.trainer.step})

    def _log(self, line: dict[str, Any]) -> None:
        if self.folder and self.writes:
            append_jsonl(self.folder / "log.jsonl", line)
