"""Attacks, one paper or control a file. Each makes a trigger; how poisons come from it is the same for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blto.registry import Registry

if TYPE_CHECKING:
    from blto.attacks.base import Attack

ATTACKS: Registry[Attack] = Registry(
    "attack",
    {
        "bad_encoder": "blto.attacks.bad_encoder:BadEncoder",
        "blto": "blto.attacks.blto:BLTO",
        "clean": "blto.attacks.clean:Clean",
        "ctrl": "blto.attacks.ctrl:CTRL",
        "frozen_surrogate": "blto.attacks.frozen_surrogate:FrozenSurrogate",
        "ssl_backdoor": "blto.attacks.ssl_backdoor:SSLBackdoor",
        "universal_delta": "blto.attacks.universal_delta:UniversalDelta",
        "untrained_generator": "blto.attacks.untrained_generator:UntrainedGenerator",
    },
)
