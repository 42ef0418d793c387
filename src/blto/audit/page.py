"""A scan as one HTML page, without script or network: verdict, scores beside clean encoders, what was reconstructed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Template
from markupsafe import Markup
from matplotlib.figure import Figure

from blto.analysis import residual_grid, score_strip, svg_text
from blto.audit.encoder import EncoderScan
from blto.audit.verdict import Outcome, Verdict
from blto.defenses.base import Inspection
from blto.files import show
from blto.report.svg import inline_svg
from blto.report.templates import stylesheet, template

Images = npt.NDArray[np.uint8]
SHOWN = 8
HEADINGS = {
    Verdict.CLEAN: "Nothing found",
    Verdict.SUSPECT: "Suspect",
    Verdict.INCONCLUSIVE: "Inconclusive",
}


def render_page(scan: EncoderScan, images: Images) -> str:
    """The page as text.

    Args:
        scan: the result.
        images: uint8 (N, 3, S, S), the clean ones, of which a few are shown with the reconstructed trigger.
    """
    pairs = zip(scan.outcomes, scan.inspections, strict=True)
    return _template().render(
        css=stylesheet(),
        heading=HEADINGS[scan.judgement.verdict],
        found=scan.judgement.verdict is Verdict.SUSPECT,
        scan=scan,
        judgement=scan.judgement,
        detectors=[_detector(number, *pair, images) for number, pair in enumerate(pairs)],
    )


def _detector(number: int, outcome: Outcome, inspection: Inspection, images: Images) -> dict[str, Any]:
    """What the template needs to know of one detector."""
    strip = score_strip(outcome.score, outcome.clean, outcome.planted) if outcome.clean else None
    return {
        "outcome": outcome,
        "strip": _inline(strip, f"strip{number}", f"Scores of {outcome.title}") if strip else None,
        "sheet": _inline(_sheet(inspection, images), f"sheet{number}", "Images with the reconstructed trigger")
        if inspection.trigger
        else None,
    }


def _sheet(inspection: Inspection, images: Images) -> Figure:
    """A few images, the same with the reconstructed trigger, and the difference."""
    mask, patch = inspection.trigger["mask"], inspection.trigger["patch"]
    originals = images[:SHOWN]
    stamped = torch.from_numpy(originals.copy()).float() / 255 * (1 - mask) + mask * patch
    return residual_grid(originals, (stamped * 255).round().to(torch.uint8).numpy())


def _inline(figure: Figure, prefix: str, label: str) -> Markup:
    return inline_svg(svg_text(figure), prefix, label)


@cache
def _template() -> Template:
    return template("audit", "scan.html.j2", show=show)
