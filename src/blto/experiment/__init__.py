"""One experiment from its spec to its record; `stages` knows their order."""

from blto.experiment.inputs import Data, Environment, build_attack, load_data, load_train
from blto.experiment.outcome import ENCODER, TRIGGER
from blto.experiment.spec import ExperimentSpec
from blto.experiment.stages import craft_stage, pretrain_stage, run, run_all, say_engine

__all__ = [
    "ENCODER",
    "TRIGGER",
    "Data",
    "Environment",
    "ExperimentSpec",
    "build_attack",
    "craft_stage",
    "load_data",
    "load_train",
    "pretrain_stage",
    "run",
    "run_all",
    "say_engine",
]
