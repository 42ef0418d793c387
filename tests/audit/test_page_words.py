"""What the page of a scan says of an encoder that stands alone: nothing that could be taken for an answer."""

from __future__ import annotations

import numpy as np
import torch

from blto.audit.encoder import EncoderScan
from blto.audit.page import render_page
from blto.audit.verdict import Outcome, judge
from blto.defenses.base import Inspection

IMAGES = np.full((2, 3, 8, 8), 100, np.uint8)
TRIGGER = {"mask": torch.ones(1, 8, 8), "patch": torch.zeros(3, 8, 8)}


def page(outcome: Outcome, inspection: Inspection) -> str:
    return render_page(
        EncoderScan(
            file="e.pth",
            sha256="0" * 64,
            format="torch zip",
            notes=("A note.",),
            judgement=judge([outcome], alpha=0.05),
            outcomes=(outcome,),
            inspections=(inspection,),
            images="2 images of noise",
            tested=(),
            not_tested=(),
            alpha=0.05,
            seconds=1.0,
        ),
        IMAGES,
    )


def test_a_threshold_that_is_crossed_is_no_verdict() -> None:
    text = page(Outcome("decree", "DECREE", 0.99, True, {"steps": 9.0}), Inspection(0.99, True, {}, TRIGGER))
    assert "at 0.05 takes at least 19 of them" in text
    assert "a drill needs clean encoders" in text
    assert (
        "Score 0.990, with no clean encoder beside it. By its own threshold: a backdoor. The verdict does not" in text
    )
    assert "reconstructed no trigger" not in text
    assert text.count("<svg") == 1


def test_a_search_that_found_nothing_says_how_long_it_was() -> None:
    text = page(Outcome("decree", "DECREE", 0.0, False, {"steps": 30.0}), Inspection(0.0, False))
    assert "By its own threshold: no backdoor." in text
    assert "It reconstructed no trigger in 30 steps." in text
    assert "<svg" not in text


def test_beside_clean_encoders_it_says_so() -> None:
    text = page(Outcome("x", "X", 0.5, None, {}, clean=(0.1, 0.9)), Inspection(0.5, None))
    assert "Score 0.500, p = 0.667 beside 2 clean encoders. It has no threshold of its own." in text
    assert "see the option for a drill" in text
    assert "no clean encoder" not in text
