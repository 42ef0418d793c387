"""Pretraining: SSL methods, one file each, and the one loop that trains them. Knows no label, no poison, no attack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blto.registry import Registry

if TYPE_CHECKING:
    from blto.pretraining.method import SSLMethod

METHODS: Registry[SSLMethod] = Registry(
    "method",
    {
        "byol": "blto.pretraining.methods.byol:BYOL",
        "moco": "blto.pretraining.methods.moco:MoCo",
        "simclr": "blto.pretraining.methods.simclr:SimCLR",
        "simsiam": "blto.pretraining.methods.simsiam:SimSiam",
    },
)
