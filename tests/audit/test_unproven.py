"""A scan says which of its detectors have shown nothing yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from blto.audit.encoder import scan_encoder
from blto.defenses.channel_outlier import ChannelOutlier
from blto.defenses.evidence import Evidence
from blto.records import RunStore
from tests.factories import random_images, tiny_encoders


def test_an_experimental_detector_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = tiny_encoders(tmp_path, 1)

    def notes() -> tuple[str, ...]:
        images, detectors = random_images(64, size=16).without_labels(), [{"name": "channel_outlier"}]
        return scan_encoder(file, images, detectors=detectors, store=RunStore(tmp_path / "s")).notes

    assert notes() == ()
    monkeypatch.setattr(ChannelOutlier, "evidence", Evidence("It has found nothing."))
    assert notes() == ("Strongest channel is experimental: It has found nothing.",)
