"""The state of a training as one safetensors file: no pickle, checksummed, equal bit for bit after loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blto.errors import Mismatch
from blto.files import show
from blto.files.safetensors import read_safetensors, write_safetensors
from blto.pretraining.trainer import Trainer

State = dict[str, Tensor]


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """The optimiser's buffers as `<parameter number>.<name>` -> tensor; its settings are the recipe's, not state."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, buffers in optimizer.state_dict()["state"].items()
        for name, value in buffers.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put `optimizer_state` back."""
    buffers: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, name = key.split(".", 1)
        buffers.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": buffers})


def trainer_state(trainer: Trainer) -> State:
    """Weights, batch-norm statistics, optimiser state, step and NaN flag."""
    return {
        **prefixed("method", trainer.method.state_dict()),
        **prefixed("optimizer", optimizer_state(trainer.optimizer)),
        "step": torch.tensor(trainer.step),
        "first_bad_step": trainer.first_bad_step,
    }


def restore_trainer(trainer: Trainer, state: Mapping[str, Tensor]) -> None:
    """Put `trainer_state` back."""
    trainer.method.load_state_dict(without_prefix("method", state), strict=True)
    restore_optimizer(trainer.optimizer, without_prefix("optimizer", state))
    trainer.step = int(state["step"])
    trainer.first_bad_step = state["first_bad_step"].to(trainer.fabric.device)


def prefixed(prefix: str, state: Mapping[str, Any]) -> State:
    """The same tensors under `prefix.`."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def without_prefix(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The tensors that stand under `prefix.`, by the rest of their names."""
    return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(f"{prefix}.")}


def save_checkpoint(path: Path, state: Mapping[str, Tensor], *, identity: str, facts: Any) -> None:
    """Write `state` and the global random state; `identity` names the run and `facts` is plain data kept beside."""
    tensors = {**state, "random_state": torch.get_rng_state()}
    arrays = {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in tensors.items()}
    write_safetensors(path, arrays, {"identity": identity, "facts": json.dumps(facts, sort_keys=True)})


def load_checkpoint(path: Path, *, identity: str) -> tuple[State, Any]:
    """Read what `save_checkpoint` wrote and set the global random state; returns (state, facts).

    Raises:
        InputRefused: the file is damaged.
        Mismatch: it belongs to another recipe, seed or dataset, or was trained in another precision or number of
            processes.
    """
    arrays, metadata = read_safetensors(path)
    if metadata.get("identity") != identity:
        raise Mismatch(
            f"{path.name}: was written by another recipe, seed or dataset, or in another precision (auto depends on "
            "the machine) or number of processes; restore the old settings, or start again without --resume."
        )
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    torch.set_rng_state(state.pop("random_state"))
    return state, json.loads(metadata["facts"])


def last_good(path: Path | None) -> str:
    """For whoever's training diverged: in words, where the last checkpoint is. None: nothing is kept."""
    return f"the last good checkpoint is {show(path, 100)}" if path and path.exists() else "there is no checkpoint yet"
