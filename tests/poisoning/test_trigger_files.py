"""Triggers come back from disk exactly as they went, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blto.errors import InputRefused
from blto.files.safetensors import read_safetensors, write_safetensors
from blto.models import GENERATORS
from blto.poisoning import (
    AdditiveTrigger,
    Budget,
    FrequencyTrigger,
    GeneratorTrigger,
    IdentityTrigger,
    PatchTrigger,
    Trigger,
    apply_to_uint8,
    load_trigger,
    save_trigger,
)
from blto.poisoning.trigger import trigger_identity

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)


_PATCH = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
_KINDS = ["identity", "additive", "unet", "hourglass", "resnet", "frequency", "patch"]


def _triggers() -> list[Trigger]:
    torch.manual_seed(0)
    unet = {"name": "unet", "width": 4}
    hourglass = {"name": "hourglass", "width": 4}
    resnet = {"name": "resnet", "width": 4, "blocks": 1, "dropout": 0.25}
    return [
        IdentityTrigger(),
        AdditiveTrigger(torch.randn(3, 8, 8), Budget(8 / 255)),
        GeneratorTrigger(GENERATORS.build(unet), Budget(0.1), unet),
        GeneratorTrigger(GENERATORS.build(hourglass), Budget(0.1), hourglass),
        GeneratorTrigger(GENERATORS.build(resnet), Budget(1), resnet, "image"),
        FrequencyTrigger(magnitude=50, test_magnitude=100, window=8, positions=(3, 7)),
        PatchTrigger(_PATCH, seed=2**62, placement=(0.25, 0.75), test_placement=(0.1, 0.9)),
    ]


@pytest.mark.parametrize("trigger", _triggers(), ids=_KINDS)
def test_round_trip(trigger: Trigger, tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, trigger)
    state = torch.random.get_rng_state()
    loaded = load_trigger(path)
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws nothing
    assert type(loaded) is type(trigger)
    assert loaded.identity == trigger.identity
    assert loaded.spec() == trigger.spec()
    assert loaded.budget == trigger.budget
    assert not loaded.training
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert np.array_equal(apply_to_uint8(loaded, IMAGES), apply_to_uint8(trigger, IMAGES))
    assert loaded.at_test().identity == trigger.at_test().identity
    assert np.array_equal(apply_to_uint8(loaded.at_test(), IMAGES), apply_to_uint8(trigger.at_test(), IMAGES))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_trigger(tmp_path / name, _triggers()[3])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_flipped_bits_and_every_truncation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, AdditiveTrigger(torch.randn(3, 2, 2), Budget(0.1)))
    data = path.read_bytes()
    mutants = [data[:length] for length in range(0, len(data), 3)]
    for position in range(0, 8 * len(data), 13):  # every byte of the header in turn, and each of its bits
        byte = data[position // 8] ^ 1 << position % 8
        mutants.append(data[: position // 8] + bytes([byte]) + data[position // 8 + 1 :])
    for mutant in mutants:
        path.write_bytes(mutant)
        with pytest.raises(InputRefused, match=r"trigger\.safetensors"):
            load_trigger(path)


def _forge(path: Path, spec: Any, arrays: dict[str, Any]) -> None:
    """A trigger file whose identity and checksum are right, as an attacker would write it."""
    metadata = {"blto_trigger": json.dumps(spec)}
    metadata["identity"] = trigger_identity(spec, arrays) if isinstance(spec, dict) else "0" * 64
    write_safetensors(path, arrays, metadata)


ADDITIVE = {"kind": "additive", "epsilon": 0.1, "image_size": 2}
HUGE = {"kind": "generator", "epsilon": 0.1, "parametrisation": "residual"}
WAVES = {"kind": "frequency", "magnitude": 50.0, "test_magnitude": 100.0, "window": 8, "positions": [3, 7]}
PATCH = {"kind": "patch", "patch_size": 2, "seed": 0, "placement": [0.2, 0.8], "test_placement": [0, 1]}
PIXELS = np.zeros((3, 2, 2), dtype=np.uint8)
DELTA = np.zeros((3, 2, 2), dtype=np.float32)


@pytest.mark.parametrize(
    ("spec", "arrays", "message"),
    [
        ([1], {}, "do not match the identity"),
        ({"kind": "addditive", "epsilon": 0.1}, {}, 'did you mean "additive"'),
        ({"epsilon": 0.1}, {}, "unknown kind"),
        ({"kind": ["additive"]}, {}, "unknown kind"),
        ({**ADDITIVE, "epsilon": 1.5}, {"delta": DELTA}, "less than or equal to 1"),
        ({**ADDITIVE, "code": "x"}, {"delta": DELTA}, "unknown key"),
        ({**ADDITIVE, "image_size": 4}, {"delta": DELTA}, "1 of its tensors do not fit .*delta"),
        ({**ADDITIVE, "image_size": 10**9}, {"delta": DELTA}, "less than or equal to 4096"),
        (ADDITIVE, {}, "1 of its tensors do not fit"),
        (ADDITIVE, {"delta": DELTA, "other\x1b[2J": DELTA}, r"1 of its tensors do not fit .*other\\x1b"),
        (ADDITIVE, {"delta": DELTA.astype(np.float64)}, "1 of its tensors do not fit"),
        ({**HUGE, "generator": {"name": "resnet", "width": 256, "blocks": 16}}, {"delta": DELTA}, "do not fit"),
        ({**HUGE, "generator": {"name": "os:system"}}, {}, "unknown generator"),
        ({**WAVES, "positions": [8]}, {}, "positions are 8, and a window has 8 coefficients a side"),
        ({**WAVES, "positions": list(range(10**5))}, {}, "positions are 0, 1, 2,"),
        ({**WAVES, "magnitude": 1e30}, {}, "less than or equal to 10000"),
        (WAVES, {"delta": DELTA}, "1 of its tensors do not fit"),
        ({**PATCH, "patch_size": 3}, {"patch": PIXELS}, "1 of its tensors do not fit .*patch"),
        ({**PATCH, "placement": [0.8, 0.2]}, {"patch": PIXELS}, "0 <= from <= to <= 1"),
        ({**PATCH, "placement": [0.5]}, {"patch": PIXELS}, "placement"),
        (PATCH, {"patch": PIXELS.astype(np.float32)}, "1 of its tensors do not fit"),
        (PATCH, {}, "1 of its tensors do not fit"),
    ],
)
def test_a_forged_file_is_refused(spec: Any, arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    _forge(path, spec, arrays)
    with pytest.raises(InputRefused, match=message) as refusal:
        load_trigger(path)
    assert refusal.value.code == "CKPT-REFUSED"
    assert "\x1b" not in str(refusal.value)
    assert len(str(refusal.value).removeprefix(str(path))) < 300


def test_weights_swapped_under_the_same_identity_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, AdditiveTrigger(torch.zeros(3, 2, 2), Budget(0.1)))
    arrays, metadata = read_safetensors(path)
    write_safetensors(path, {"delta": arrays["delta"] + 1}, metadata)
    with pytest.raises(InputRefused, match="do not match the identity"):
        load_trigger(path)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, {"weight": DELTA}, {"format": "pt"})
    with pytest.raises(InputRefused, match=r"encoder\.safetensors: is not a trigger"):
        load_trigger(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"none\.safetensors"):
        load_trigger(tmp_path / "none.safetensors")
