"""A scan as one HTML page, without script or network: verdict, scores beside clean encoders, what was reconstructed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Template
from markupsafe import Markup
from matplotlib.figure import Figure

from blto.analysis import residual_grid, score_strip, svg_text
from blto.audit.encoder import EncoderScan
from blto.audit.pile.scan import DataScan
from blto.audit.verdict import Outcome, Verdict
from blto.defenses.base import Inspection
from blto.files import show
from blto.report.svg import inline_svg
from blto.report.templates import stylesheet, template

Images = npt.NDArray[np.uint8]
SHOWN = 8
RECONSTRUCTED = (
    "Clean images with the trigger that was reconstructed. Clean encoders yield one too; what counts is the score "
    "beside theirs."
)
HEADINGS = {
    Verdict.CLEAN: "Nothing found",
    Verdict.SUSPECT: "Suspect",
    Verdict.INCONCLUSIVE: "Inconclusive",
}


@dataclass(frozen=True)
class Section:
    """What the page says of one detector: sentences, then figures, each with its caption."""

    title: str
    sentences: Sequence[str]
    figures: Sequence[tuple[Markup, str]]


def render(
    what: str, scan: EncoderScan | DataScan, facts: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> str:
    """A page as text: the verdict, a table of `facts`, then a section for each detector."""
    return _template().render(
        css=stylesheet(),
        what=what,
        heading=HEADINGS[scan.judgement.verdict],
        found=scan.judgement.verdict is Verdict.SUSPECT,
        scan=scan,
        judgement=scan.judgement,
        facts=[*facts, ("Time", f"{scan.seconds:.0f} s"), *(("Note", note) for note in scan.notes)],
        detectors=sections,
    )


def render_page(scan: EncoderScan, images: Images) -> str:
    """The page of an encoder's scan.

    Args:
        scan: the result.
        images: uint8 (N, 3, S, S), the clean ones, of which a few are shown with the reconstructed trigger.
    """
    compared = any(outcome.clean for outcome in scan.outcomes)
    power = f"not measured ({'see the option for a drill' if compared else 'a drill needs clean encoders'})"
    if scan.judgement.power:
        share, low, high, count = scan.judgement.power
        power = f"{share:.0%} of {count} encoders that blto tampered with were found [{low:.0%}, {high:.0%}]"
    facts = [
        ("File", f"{show(scan.file, 80)}, {scan.format}"),
        ("SHA-256", scan.sha256),
        ("Images shown to it", scan.images),
        ("Error rate asked for", f"{scan.alpha:g} for a clean encoder, over all detectors"),
        ("Power", power),
    ]
    pairs = zip(scan.outcomes, scan.inspections, strict=True)
    return render("an encoder", scan, facts, [_section(number, *pair, images) for number, pair in enumerate(pairs)])


def _section(number: int, outcome: Outcome, inspection: Inspection, images: Images) -> Section:
    """What the page says of one detector."""
    by_threshold = {
        True: "By its own threshold: a backdoor. The verdict does not go by that, but by clean encoders.",
        False: "By its own threshold: no backdoor.",
        None: "It has no threshold of its own.",
    }
    beside = "with no clean encoder beside it"
    if outcome.p_value is not None:
        beside = f"p = {outcome.p_value:.3g} beside {len(outcome.clean)} clean encoders"
    figures = []
    if outcome.clean:
        strip = score_strip(outcome.score, outcome.clean, outcome.planted)
        planted = ", and those that blto tampered with" if outcome.planted else ""
        caption = f"The suspect beside clean encoders of its family{planted}. To the right is more suspicious."
        figures.append((_inline(strip, f"strip{number}", f"Scores of {outcome.title}"), caption))
    if inspection.trigger:
        sheet = _inline(_sheet(inspection, images), f"sheet{number}", "Images with the reconstructed trigger")
        figures.append((sheet, RECONSTRUCTED))
    sentences = [f"Score {outcome.score:.3f}, {beside}. {by_threshold[outcome.flagged]}"]
    if "steps" in outcome.measures and not inspection.trigger:
        sentences.append(f"It reconstructed no trigger in {outcome.measures['steps']:.0f} steps.")
    return Section(outcome.title, sentences, figures)


def _sheet(inspection: Inspection, images: Images) -> Figure:
    """A few images, the same with the reconstructed trigger, and the difference."""
    trigger = inspection.trigger
    if "triggered" in trigger:
        return residual_grid(_to_uint8(trigger["plain"]), _to_uint8(trigger["triggered"]))
    originals, mask = images[:SHOWN], trigger["mask"]
    stamped = torch.from_numpy(originals.copy()).float() / 255 * (1 - mask) + mask * trigger["patch"]
    return residual_grid(originals, _to_uint8(stamped))


def _to_uint8(pixels: torch.Tensor) -> Images:
    return (pixels * 255).round().to(torch.uint8).numpy()


def _inline(figure: Figure, prefix: str, label: str) -> Markup:
    return inline_svg(svg_text(figure), prefix, label)


@cache
def _template() -> Template:
    return template("audit", "scan.html.j2", show=show)
