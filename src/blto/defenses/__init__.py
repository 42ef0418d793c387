"""Defenses, one paper a file. Each says what it may see; `base` hands it that and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blto.registry import Registry

if TYPE_CHECKING:
    from blto.defenses.base import Defense

DEFENSES: Registry[Defense] = Registry(
    "defense",
    {
        "activation_clustering": "blto.defenses.activation_clustering:ActivationClustering",
        "channel_outlier": "blto.defenses.channel_outlier:ChannelOutlier",
        "clp": "blto.defenses.clp:CLP",
        "decree": "blto.defenses.decree:DECREE",
        "frequency_screening": "blto.defenses.frequency_screening:FrequencyScreening",
        "input_consistency": "blto.defenses.input_consistency:InputConsistency",
        "local_density": "blto.defenses.local_density:LocalDensity",
        "patch_search": "blto.defenses.patch_search:PatchSearch",
        "spectral": "blto.defenses.spectral:SpectralSignatures",
    },
)
