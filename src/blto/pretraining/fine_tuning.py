"""The one loop that fine-tunes a trained encoder on losses of somebody's own, with its batch norm as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blto.errors import Diverged, Interrupted
from blto.files import append_jsonl, canonical_json, sha256_bytes
from blto.models.encoder import Encoder
from blto.pretraining import checkpoint
from blto.pretraining.loop import Observer, observe, observed_epochs
from blto.pretraining.trainer import training_precision
from blto.runtime.device import fabric, resolve_device
from blto.runtime.interrupts import stop_requests
from blto.runtime.progress import SILENT, Progress

LOG, CHECKPOINT = "log.jsonl", "checkpoint.safetensors"
STEPS_BETWEEN_SAVES = 200
OBSERVATIONS = 10


@dataclass(frozen=True)
class Tuning:
    """How long and how fast an encoder is fine-tuned: SGD with momentum 0.9, a constant learning rate."""

    steps_per_epoch: int
    epochs: int
    lr: float
    weight_decay: float


def fine_tune(
    encoder: Encoder,
    losses: Callable[[Encoder, int], Mapping[str, Tensor]],
    tuning: Tuning,
    *,
    identity: Mapping[str, Any],
    device: str = "auto",
    folder: Path | None = None,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    progress: Progress = SILENT,
    title: str,
) -> list[dict[str, float]]:
    """Minimise the sum of `losses(encoder, step)` in all weights but batch norm's, which stays as it is, altogether.

    Resumable: what is drawn in a step has to be a function of its number.

    Args:
        encoder: trained in place, in evaluation mode throughout.
        losses: name -> value, of one step, on the encoder's device.
        tuning: the schedule.
        identity: what the result is a function of, for its checkpoint.
        device: "auto", "cpu" or "cuda".
        folder: where log and checkpoint go; None keeps nothing.
        resume: go on from the folder's checkpoint where there is one.
        observers: see `pretraining.loop.Observer`; epochs are those of the fine-tuning.
        progress, title: where progress goes, and under which name.

    Returns:
        A row per observed epoch: `epoch`, the losses, and what the observers say.

    Raises:
        Diverged: a loss became NaN or Inf.
        Interrupted: Ctrl-C or SIGTERM; the state is saved if there is a folder.
    """
    device = resolve_device(device)
    precision = training_precision("auto", "fast", device)
    place = fabric(device, precision)
    encoder.to(place.device).eval()
    norms = {id(p) for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    trained = [p for p in encoder.parameters() if id(p) not in norms]
    frozen = [p for p in encoder.parameters() if id(p) in norms]
    optimizer = torch.optim.SGD(trained, lr=tuning.lr, momentum=0.9, weight_decay=tuning.weight_decay)
    run = _Run(encoder, optimizer, tuning, folder, sha256_bytes(canonical_json(dict(identity))))
    total = tuning.epochs * tuning.steps_per_epoch
    looked_at = observed_epochs(tuning.epochs, OBSERVATIONS)
    native = precision == "bf16" and device == "cpu"
    with _prepared(encoder, frozen, native), progress.bar(title, total) as advance, stop_requests() as stop:
        if resume:
            run.restore()
        if run.step == 0:
            run.note(0, {}, observe(observers, encoder, 0))
        while run.step < total:
            with place.autocast():
                found = losses(encoder, run.step)
            loss = torch.stack(list(found.values())).sum()
            values = {name: float(value.detach()) for name, value in found.items()}
            if not torch.isfinite(loss):
                raise Diverged(f"the loss became NaN or Inf at step {run.step} of {total}; lower its learning rate.")
            optimizer.zero_grad(set_to_none=True)
            place.backward(loss)
            optimizer.step()
            run.step += 1
            epoch, rest = divmod(run.step, tuning.steps_per_epoch)
            if rest == 0 and epoch in looked_at:
                run.note(epoch, values, observe(observers, encoder, epoch))
            if run.step % STEPS_BETWEEN_SAVES == 0:
                run.save()
            advance(run.step, " ".join(f"{name} {value:.3f}" for name, value in values.items()))
            if stop and run.step < total:
                run.save()
                kept = "run the same command with --resume" if folder else "nothing was kept"
                raise Interrupted(f"stopped at step {run.step} of {total}; {kept}.", signal_number=stop.signal_number)
    return run.trajectory


@contextmanager
def _prepared(encoder: Encoder, frozen: Sequence[Tensor], native: bool) -> Iterator[None]:
    """The encoder on the engine that trains it, with some parameters frozen; afterwards plain, whatever happened."""
    encoder.native = native
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        encoder.native = False
        for parameter in frozen:
            parameter.requires_grad_(True)


class _Run:
    """Where a fine-tuning stands, and what of it outlives the process."""

    def __init__(
        self, encoder: Encoder, optimizer: torch.optim.Optimizer, tuning: Tuning, folder: Path | None, identity: str
    ) -> None:
        self.encoder, self.optimizer, self.folder, self.identity = encoder, optimizer, folder, identity
        self.step = 0
        self.trajectory: list[dict[str, float]] = []

    def note(self, epoch: int, values: Mapping[str, float], observed: Mapping[str, float]) -> None:
        """A row of the trajectory, and its line in the log."""
        self.trajectory.append({"epoch": float(epoch), **values, **observed})
        if self.folder:
            append_jsonl(self.folder / LOG, {"event": "observed", **self.trajectory[-1]})

    def save(self) -> None:
        """Write the checkpoint."""
        if self.folder:
            state = {
                **checkpoint.prefixed("encoder", self.encoder.state_dict()),
                **checkpoint.prefixed("optimizer", checkpoint.optimizer_state(self.optimizer)),
            }
            facts = {"step": self.step, "trajectory": self.trajectory}
            checkpoint.save_checkpoint(self.folder / CHECKPOINT, state, identity=self.identity, facts=facts)

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.folder and (self.folder / CHECKPOINT).exists():
            state, facts = checkpoint.load_checkpoint(self.folder / CHECKPOINT, identity=self.identity)
            self.encoder.load_state_dict(checkpoint.without_prefix("encoder", state))
            checkpoint.restore_optimizer(self.optimizer, checkpoint.without_prefix("optimizer", state))
            self.step, self.trajectory = facts["step"], facts["trajectory"]
