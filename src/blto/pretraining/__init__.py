"""Pretraining: SSL methods, one file each, and the one loop that trains them. Knows no label, no poison, no attack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blto.registry import Registry

if TYPE_CHECKING:
    from blto.pretraining.method import SSLMethod

METHODS: Registry[SSLMethod] = Registry(
    "method",
    {
        "byol": "blto.pretraining.byol:BYOL",
        "moco": "blto.pretraining.moco:MoCo",
        "simclr": "blto.pretraining.simclr:SimCLR",
        "simsiam": "blto.pretraining.simsiam:SimSiam",
    },
)
