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
        "beatrix": "blto.defenses.beatrix:Beatrix",
        "carried_trigger": "blto.defenses.carried_trigger:CarriedTrigger",
        "channel_outlier": "blto.defenses.channel_outlier:ChannelOutlier",
        "clean_fine_tuning": "blto.defenses.clean_fine_tuning:CleanFineTuning",
        "clp": "blto.defenses.clp:CLP",
        "decree": "blto.defenses.decree:DECREE",
        "distillation": "blto.defenses.distillation:Distillation",
        "fine_pruning": "blto.defenses.fine_pruning:FinePruning",
        "frequency_screening": "blto.defenses.frequency_screening:FrequencyScreening",
        "generator_inversion": "blto.defenses.generator_inversion:GeneratorInversion",
        "i_cutmix": "blto.defenses.recipe_changes:ICutMix",
        "input_consistency": "blto.defenses.input_consistency:InputConsistency",
        "local_density": "blto.defenses.local_density:LocalDensity",
        "localized_cropping": "blto.defenses.recipe_changes:LocalizedCropping",
        "patch_search": "blto.defenses.patch_search:PatchSearch",
        "repeated_windows": "blto.defenses.repeated_windows:RepeatedWindows",
        "spectral": "blto.defenses.spectral:SpectralSignatures",
        "ssl_cleanse": "blto.defenses.ssl_cleanse:SSLCleanse",
        "strong_augmentation": "blto.defenses.recipe_changes:StrongAugmentation",
        "unlearning": "blto.defenses.unlearning:Unlearning",
    },
)
