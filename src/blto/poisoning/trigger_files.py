"""Triggers on disk: one safetensors file with the weights, the spec that rebuilds them, and their identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from blto.errors import ConfigError, InputRefused, nearest
from blto.files import canonical_json, show
from blto.files.reading import parse_json
from blto.files.safetensors import read_safetensors, write_safetensors
from blto.models import GENERATORS
from blto.poisoning.frequency import FrequencyTrigger
from blto.poisoning.patch import PatchTrigger
from blto.poisoning.trigger import (
    AdditiveTrigger,
    Budget,
    GeneratorTrigger,
    IdentityTrigger,
    Parametrisation,
    Trigger,
    trigger_identity,
)
from blto.registry import signature_schema, validate

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Side = Annotated[int, Field(ge=1, le=4096)]
Magnitude = Annotated[float, Field(ge=0.0, le=10_000)]
Placement = tuple[Fraction, Fraction]


def _identity() -> Trigger:
    return IdentityTrigger()


def _generator(*, epsilon: Fraction, generator: dict[str, Any], parametrisation: Parametrisation) -> Trigger:
    return GeneratorTrigger(GENERATORS.build(generator), Budget(epsilon), generator, parametrisation)


def _additive(*, epsilon: Fraction, image_size: Side) -> Trigger:
    return AdditiveTrigger(torch.zeros(3, image_size, image_size), Budget(epsilon))


def _frequency(*, magnitude: Magnitude, test_magnitude: Magnitude, window: Side, positions: tuple[int, ...]) -> Trigger:
    return FrequencyTrigger(magnitude=magnitude, test_magnitude=test_magnitude, window=window, positions=positions)


def _patch(
    *,
    patch_size: Side,
    seed: Annotated[int, Field(ge=0, lt=2**63)],
    placement: Placement,
    test_placement: Placement,
) -> Trigger:
    empty = torch.zeros(3, patch_size, patch_size, dtype=torch.uint8)
    return PatchTrigger(empty, seed=seed, placement=placement, test_placement=test_placement)


# Kind -> what rebuilds it from the rest of its spec; the arguments' annotations check a foreign spec.
_BUILDERS: dict[str, Callable[..., Trigger]] = {
    IdentityTrigger.kind: _identity,
    GeneratorTrigger.kind: _generator,
    AdditiveTrigger.kind: _additive,
    FrequencyTrigger.kind: _frequency,
    PatchTrigger.kind: _patch,
}
_KEYS = {"blto_trigger", "identity"}


def save_trigger(path: Path, trigger: Trigger) -> None:
    """Write `trigger` to `path` (`.safetensors`): its weights, with spec and identity in the file's metadata."""
    spec, arrays = trigger.spec(), trigger.arrays()
    metadata = {"blto_trigger": canonical_json(spec).decode(), "identity": trigger_identity(spec, arrays)}
    write_safetensors(path, arrays, metadata)


def load_trigger(path: Path) -> Trigger:
    """Rebuild a trigger that `save_trigger` wrote, in eval mode and on the CPU.

    Nothing is built before spec and weights match the identity in the file, and no memory is taken for weights that
    the file does not hold: the network is built without storage, compared, and only then given the file's arrays.

    Raises:
        InputRefused: not a trigger file, damaged or altered, an unknown kind, or weights that do not fit the spec.
    """
    name = show(path)
    arrays, metadata = read_safetensors(path)
    if set(metadata) != _KEYS:
        raise _refused(name, "is not a trigger; give a trigger.safetensors that blto wrote")
    spec = parse_json(metadata["blto_trigger"].encode(), f"{name}: trigger spec", code="CKPT-REFUSED")
    if not isinstance(spec, dict) or trigger_identity(spec, arrays) != metadata["identity"]:
        raise _refused(name, "spec and weights do not match the identity in the file; it was altered or is damaged")
    try:
        with torch.device("meta"):
            trigger = _build(spec)
    except ConfigError as error:
        raise _refused(name, f"its spec is not accepted: {error}") from error
    wanted = {key: (tuple(value.shape), value.dtype) for key, value in trigger.state_dict().items()}
    tensors = {key: torch.from_numpy(values) for key, values in arrays.items()}
    given = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    if differing := sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key)):
        raise _refused(
            name,
            f"{len(differing)} of its tensors do not fit its spec (first: {show(differing[0])}); take another copy",
        )
    trigger.load_state_dict(tensors, strict=True, assign=True)
    return trigger.eval()


def _build(spec: dict[str, Any]) -> Trigger:
    arguments = dict(spec)
    kind = str(arguments.pop("kind", None))
    if kind not in _BUILDERS:
        raise ConfigError(f'unknown kind "{show(kind, 40)}"; {nearest(kind, _BUILDERS)}.')
    checked = validate(signature_schema(_BUILDERS[kind], kind), arguments, "trigger")
    return _BUILDERS[kind](**{field: getattr(checked, field) for field in type(checked).model_fields})


def _refused(name: str, problem: str) -> InputRefused:
    return InputRefused(f"{name}: {problem.rstrip('.')}.", code="CKPT-REFUSED")
