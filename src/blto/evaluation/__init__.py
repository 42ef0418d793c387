"""Evaluation: features, probes, the definitions of attack success, statistics, feature geometry, stealth.

Sees encoders, triggers and predictions, never an attack.
"""

from __future__ import annotations

from blto.evaluation.backdoor import Evaluation, evaluate_backdoor
from blto.evaluation.features import Features, evaluating, extract
from blto.evaluation.follower import Follower
from blto.evaluation.geometry import alignment, displacement, similarity, uniformity
from blto.evaluation.metrics import METRIC_NAMES, aggregate, backdoor_metrics, rate
from blto.evaluation.probes import (
    PROBES,
    KNNProbe,
    LinearModel,
    LinearProbe,
    Predict,
    Probe,
    check_probe,
    fit_probe,
    knn_predict,
)
from blto.evaluation.statistics import (
    Interval,
    lift_interval,
    paired_difference_interval,
    sign_flip_test,
    student_t_interval,
    wilson,
)
from blto.evaluation.stealth import l2, linf, measure_stealth, psnr, ssim

__all__ = [
    "METRIC_NAMES",
    "PROBES",
    "Evaluation",
    "Features",
    "Follower",
    "Interval",
    "KNNProbe",
    "LinearModel",
    "LinearProbe",
    "Predict",
    "Probe",
    "aggregate",
    "alignment",
    "backdoor_metrics",
    "check_probe",
    "displacement",
    "evaluate_backdoor",
    "evaluating",
    "extract",
    "fit_probe",
    "knn_predict",
    "l2",
    "lift_interval",
    "linf",
    "measure_stealth",
    "paired_difference_interval",
    "psnr",
    "rate",
    "sign_flip_test",
    "similarity",
    "ssim",
    "student_t_interval",
    "uniformity",
    "wilson",
]
