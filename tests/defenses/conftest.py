"""Fixtures of the defenses' tests."""

from __future__ import annotations

import pytest

from blto.defenses import cluster_triggers


@pytest.fixture
def one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triggers of clusters are trained once: small encoders need no more, and tests that invert many are faster."""
    monkeypatch.setattr(cluster_triggers, "MOVES", -100.0)
