"""Figures: arrays in, matplotlib Figure out, one function per kind; `save_figure` writes SVG and CSV."""

from __future__ import annotations

from blto.analysis.bars import metric_bars
from blto.analysis.curves import (
    ProbeTrajectory,
    alignment_uniformity,
    asr_trajectory,
    crafting_curve,
    displacement_trajectory,
    similarity_trajectory,
)
from blto.analysis.embedding import embed, embedding_map
from blto.analysis.exposure import ExposurePath, exposure_map
from blto.analysis.from_record import record_figures
from blto.analysis.from_test_set import test_set_figures
from blto.analysis.images import residual_grid, residual_table
from blto.analysis.save import save_figure, svg_text
from blto.analysis.scores import score_strip

__all__ = [
    "ExposurePath",
    "ProbeTrajectory",
    "alignment_uniformity",
    "asr_trajectory",
    "crafting_curve",
    "displacement_trajectory",
    "embed",
    "embedding_map",
    "exposure_map",
    "metric_bars",
    "record_figures",
    "residual_grid",
    "residual_table",
    "save_figure",
    "score_strip",
    "similarity_trajectory",
    "svg_text",
    "test_set_figures",
]
