"""The scan of a pile of images: learn, score all, compare with clean ones, say how sure that is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from blto.audit.pile.comparison import Drill, Found, judge, look, usable_shares
from blto.audit.pile.lessons import learn, learn_once, syllabus
from blto.audit.pile.screens import USUAL, build_screens
from blto.audit.pile.sources import Batch, Loaded, Part, Reading, Source, first_side, read
from blto.audit.pile.working import Executors, Scanning, unlike
from blto.audit.verdict import Judgement
from blto.errors import ConfigError, InputRefused
from blto.records import RunStore
from blto.runtime.interrupts import stop_requests
from blto.runtime.progress import SILENT, Progress

FORMAT = 1
"""Raised when the same images come to give another summary, so that no old one is found."""
LARGEST = 224
"""Pixels a side of the squares where nothing says otherwise and images are larger."""
FEWEST = 10
NOT_TESTED = (
    "Triggers that change an image by little and differently in each (BLTO): no detector here is known to see them.",
    "Patches that were resized, blended or stored as JPEG after they were pasted.",
    "Labels and captions: wrong ones are not looked for.",
)


@dataclass(frozen=True)
class DataScan:
    """A scan's result.

    Attributes:
        file: the name of the suspects.
        sha256: over the names and bytes of all that were read, in order.
        judgement: verdict, p-value, reasons, power against the attack that the scan finds least.
        found: by each detector.
        drills: by each attack.
        suspects, clean: what was compared, in words.
        count, clean_count: of images that were compared.
        unreadable: name and reason of images that cannot be read, at most 1,000 of either set.
        notes: as sentences.
        tested, not_tested: what this scan can and cannot speak of.
        alpha: the error rate asked for.
        seconds: of wall time.
    """

    file: str
    sha256: str
    judgement: Judgement
    found: tuple[Found, ...]
    drills: tuple[Drill, ...]
    suspects: str
    clean: str
    count: int
    clean_count: int
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    tested: tuple[str, ...]
    not_tested: tuple[str, ...]
    alpha: float
    seconds: float

    @property
    def leading(self) -> Found:
        """The detector that finds most, or the first one where none can tell."""
        return min(self.found, key=lambda each: each.best.p_value if each.best else 1.0)


def scan_pile(
    suspects: Source,
    clean: Source | None = None,
    *,
    detectors: Sequence[str | Mapping[str, Any]] = USUAL,
    drill: float = 0.0,
    alpha: float = 0.05,
    seed: int = 0,
    skip_bad: int = 0,
    image_size: int | None = None,
    executors: Executors,
    store: RunStore,
    progress: Progress = SILENT,
) -> DataScan:
    """Scan images.

    Args:
        suspects: the pile.
        clean: images of the same kind that are known to be clean. Without any the verdict is "inconclusive".
        detectors: entries of DEFENSES, see `screens`.
        drill: share of clean images that blto poisons, `RUNS` times with each of two attacks, to measure the power.
        alpha: the chance at which clean suspects may be called suspect.
        seed: of all that is drawn.
        skip_bad: how many images may be unreadable, of both sets together.
        image_size: of the squares that the frequency screening looks at.
        executors: gives an executor for a work.
        store: keeps what was learned and the result of every part.
        progress: where it goes.

    Raises:
        ConfigError: an option out of range, or a detector that cannot scan images.
        InputRefused: too few images for a detector, or more that cannot be read than `skip_bad`.
        Interrupted: a signal came; the same call goes on where it was.
    """
    started, screens = time.monotonic(), build_screens(detectors)
    _check(suspects, clean, drill, alpha, skip_bad)
    size = image_size or _usual_size(suspects, clean)
    with stop_requests():
        identity = {
            "format": FORMAT,
            "seed": seed,
            "size": size,
            "suspects": suspects.identity,
            "clean": clean.identity if clean else None,
        }
        plan = syllabus(screens, len(suspects), len(clean or ()), size, seed)
        reader = partial(_read, size=size)
        lessons = []
        for screen, rows in zip(screens, plan, strict=True):
            progress.say(f"{screen.title}: learns from {len(rows[0]) + len(rows[1])} images")
            stage = store.stage("learn", {**identity, "detector": screen.spec})
            make = partial(learn, screen, rows, (suspects, clean), (reader, reader))
            lessons.append(learn_once(stage, make, rows))
        inputs = {**identity, "detectors": [screen.spec for screen in screens]}
        scanning = Scanning(screens, size, inputs, executors, store, progress)
        sides = scanning.sides([suspects, *([clean] if clean else [])], lessons, skip_bad)
        drills = scanning.drills(clean, drill, alpha, seed) if drill and clean else []
    shares = usable_shares(sides[1].count, sides[0].count, len(screens), alpha) if clean else []
    found = tuple(
        Found(
            screen.spec["name"],
            screen.title,
            look(sides[0].histograms[number], sides[1].histograms[number], shares),
            tuple((name, score) for score, name in sides[0].tops[number]),
            sides[0].seconds[number] + sides[1].seconds[number],
        )
        for number, screen in enumerate(screens)
    )
    counts = (sides[0].count, sides[1].count)
    refused = sides[0].refused + sides[1].refused
    notes = [*suspects.notes, *(clean.notes if clean else ())]
    if refused:
        notes.append(f"{refused} images cannot be read and were left out.")
    return DataScan(
        file=suspects.name,
        sha256=sides[0].digest,
        judgement=judge(found, images=counts, alpha=alpha, unlike=unlike(*sides) if clean else None, drills=drills),
        found=found,
        drills=tuple(drills),
        suspects=f"{counts[0]:,} images of {suspects.name}",
        clean=f"{counts[1]:,} images of {clean.name}" if clean else "none",
        count=counts[0],
        clean_count=counts[1],
        unreadable=tuple(sides[0].unreadable + sides[1].unreadable),
        notes=tuple(notes),
        tested=tuple(f"{screen.title}: {screen.summary}." for screen in screens),
        not_tested=NOT_TESTED,
        alpha=alpha,
        seconds=time.monotonic() - started,
    )


def _check(suspects: Source, clean: Source | None, drill: float, alpha: float, skip_bad: int) -> None:
    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha is {alpha:g}; give a share between 0 and 1.")
    if not 0 <= drill < 1:
        raise ConfigError(f"--drill is {drill:g}; give the share of images to poison, from 0 to below 1.")
    if drill and clean is None:
        raise ConfigError(f"--drill {drill:g} poisons clean images, and there are none; give --clean too.")
    if skip_bad < 0:
        raise ConfigError(f"--skip-bad is {skip_bad}; give 0 or more.")
    for source, needed in ((suspects, FEWEST), *(((clean, 4 * FEWEST),) if clean else ())):
        if len(source) < needed:
            raise InputRefused(f"{source.name}: {len(source)} images, and the detectors need {needed}; give more.")
    if clean and clean.identity == suspects.identity:
        raise ConfigError(f"--clean: {clean.name} is what is to be scanned; give other images, known to be clean.")


def _usual_size(suspects: Source, clean: Source | None) -> int:
    """Pixels a side of the squares: as the first images are, and not more than `LARGEST`."""
    sides = [
        source.image_size if isinstance(source, Loaded) else first_side(source.parts(FEWEST))
        for source in (suspects, clean)
        if source
    ]
    known = [side for side in sides if side is not None]
    if not known:
        raise InputRefused(f"{suspects.name}: no image in it can be read.", code="IMAGE-REFUSED")
    return max(8, min(*known, LARGEST))


def _read(part: Part, size: int) -> Iterator[Batch]:
    return read(part, size, Reading())
