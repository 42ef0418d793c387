"""Poisoning: bounded triggers, which images are poisoned, the poisoned set, and its verifiable form on disk."""

from blto.poisoning.dataset import Perturbation, PoisonedDataset
from blto.poisoning.export import write_poisoned
from blto.poisoning.frequency import FrequencyTrigger
from blto.poisoning.manifest import Manifest, build_manifest
from blto.poisoning.patch import PatchTrigger
from blto.poisoning.plan import PoisonPlan, plan_replacement
from blto.poisoning.quantise import apply_to_uint8, quantise
from blto.poisoning.trigger import AdditiveTrigger, Budget, GeneratorTrigger, IdentityTrigger, Trigger, project
from blto.poisoning.trigger_files import load_trigger, save_trigger
from blto.poisoning.verification import VerifyReport, verify

__all__ = [
    "AdditiveTrigger",
    "Budget",
    "FrequencyTrigger",
    "GeneratorTrigger",
    "IdentityTrigger",
    "Manifest",
    "PatchTrigger",
    "Perturbation",
    "PoisonPlan",
    "PoisonedDataset",
    "Trigger",
    "VerifyReport",
    "apply_to_uint8",
    "build_manifest",
    "load_trigger",
    "plan_replacement",
    "project",
    "quantise",
    "save_trigger",
    "verify",
    "write_poisoned",
]
