"""A made-up record, with any text put wherever a report shows text from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blto.records import Metric, RunRecord, took

MakeRecord = Callable[..., RunRecord]


def metrics(lift: float | None, shift: float = 0.0) -> dict[str, Metric]:
    def metric(value: float | None, n: int) -> Metric:
        return Metric(value=value, low=value and value - 0.01, high=value and value + 0.01, n=n)

    asr = None if lift is None else lift + 0.06 + shift
    values: dict[str, float | None] = {"lift": lift, "asr": asr, "asr_clean_twin": 0.06, "untriggered_rate": 0.021}
    return {**{name: metric(value, 9000) for name, value in values.items()}, "clean_accuracy": metric(0.874, 10000)}


@pytest.fixture
def make_record() -> MakeRecord:
    def make(run_id: str = "r", lift: float | None = 0.85, text: str = "cat", **changes: Any) -> RunRecord:
        probes = {"knn": metrics(lift), "linear": metrics(lift)}
        spec = {
            "attack": {"name": "blto", "poison_rate": 0.01, "epsilon": 8 / 255, "note": text},
            "data": {"name": text, "class_names": [text]},
            "pretraining": {"method": {"name": "simclr"}},
            "seed": 3,
        }
        fields: dict[str, Any] = {
            "run_id": run_id,
            "spec": spec,
            "metrics": probes,
            "took": took(probes),
            "similarity": {"raw": 0.9, "normalised": 0.8},
            "stealth": {"linf": 8 / 255, "psnr": 33.44, "ssim": 0.95, "changed": 1.0, "lpips": 0.012345},
            "provenance": {"data": {"note": text}, "seconds": 3.5},
            "artefacts": {text: "ab" * 32},
        }
        return RunRecord(**{**fields, **changes})

    return make
