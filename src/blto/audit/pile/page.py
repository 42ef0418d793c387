"""A scan of images as one HTML page: verdict, what each detector counted, and its most suspicious images to look at."""

from __future__ import annotations

import base64

import numpy as np
from markupsafe import Markup
from PIL import Image

from blto.audit.page import Section, render
from blto.audit.pile.comparison import Found
from blto.audit.pile.scan import DataScan
from blto.audit.pile.sources import Reading, Source, read
from blto.files import show
from blto.files.images import encode_png

SHOWN = 40
PIXELS = 128
"""Of the longer side of an image on the page."""
SHEET = Markup('<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(4rem,1fr));gap:6px">{}</div>')
CELL = Markup('<img style="width:100%;image-rendering:{}" alt="{}" title="{}" src="data:image/png;base64,{}">')


def render_pile_page(scan: DataScan, suspects: Source) -> str:
    """The page as text; `suspects` are read again for their most suspicious images."""
    power = [
        f"{drill.attack} at a rate of {drill.rate:g}: found in {drill.found} of {drill.runs} drills "
        f"[{drill.power[1]:.0%}, {drill.power[2]:.0%}], {drill.suspects:,} images beside {drill.clean:,}"
        for drill in scan.drills
    ]
    facts = [
        ("Images", scan.suspects),
        ("SHA-256 of all", scan.sha256),
        ("Clean images", scan.clean),
        ("Error rate asked for", f"{scan.alpha:g} for clean images, over all detectors"),
        *(("Power", line) for line in power or ["not measured (see the option for a drill)"]),
        *(("Unreadable", why) for _, why in scan.unreadable[:SHOWN]),
    ]
    leading_first = sorted(scan.found, key=lambda found: found is not scan.leading)
    return render("images", scan, facts, [_section(found, scan, suspects) for found in leading_first])


def _section(found: Found, scan: DataScan, suspects: Source) -> Section:
    """What the page says of one detector."""
    sentences = [
        f"Of the highest {level.share:.1%} of all: {level.suspects:,} of {scan.count:,} suspects and {level.clean:,} "
        f"of {scan.clean_count:,} clean images score {level.threshold:.3g} or more (p = {level.p_value:.3g} by itself)."
        for level in found.levels
    ]
    shown = [(name, score) for name, score in found.top[:SHOWN] if score > 0]
    if not shown:
        return Section(found.title, [*sentences, "No image has a score above 0."], [])
    caption = "The most suspicious images, the first one most. Also of clean images some are: what counts is how many."
    return Section(found.title, sentences, [(_sheet(shown, suspects), caption)])


def _sheet(shown: list[tuple[str, float]], suspects: Source) -> Markup:
    """A contact sheet; an image that cannot be read any more is left out."""
    cells, scores = [], dict(shown)
    for batch in read(suspects.named([name for name, _ in shown]), 1, Reading()):
        for name, pixels in zip(batch.names, batch.images, strict=True):
            small = Image.fromarray(pixels)
            small.thumbnail((PIXELS, PIXELS))
            label = f"{show(name, 100)}, score {scores[name]:.4g}"
            rendering = "pixelated" if max(small.size) < PIXELS else "auto"
            cells.append(CELL.format(rendering, label, label, base64.b64encode(encode_png(np.asarray(small))).decode()))
    return SHEET.format(Markup("").join(cells))
