"""The work of a scan on all images, part by part: from the store, or done and kept there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from blto.audit.pile import chunks
from blto.audit.pile.chunks import LISTED, Summary, added, jobs, nothing, score_chunk
from blto.audit.pile.comparison import Drill
from blto.audit.pile.drill import RUNS, attacks_for, drill_jobs, drill_once, drills_of
from blto.audit.pile.keeping import Kept, remove_parts, work_through
from blto.audit.pile.lessons import Lesson
from blto.audit.pile.screens import Screen
from blto.audit.pile.sources import Source
from blto.errors import InputRefused
from blto.files import show, write_text
from blto.records import RunStore
from blto.runtime.jobs import Executor, Work
from blto.runtime.progress import Progress

UNREADABLE = "unreadable.txt"
UNLIKE = 0.1
"""Share of the images by which two sets may differ in how they are stored."""
Executors = Callable[[Work], Executor]


@dataclass(frozen=True)
class Scanning:
    """What the two kinds of work on images have in common."""

    screens: Sequence[Screen]
    size: int
    inputs: Mapping[str, Any]
    executors: Executors
    store: RunStore
    progress: Progress

    def sides(self, sources: Sequence[Source], lessons: Sequence[Lesson], skip_bad: int) -> tuple[Summary, Summary]:
        """The summaries of the suspects and of the clean images, from the store or made.

        Raises:
            InputRefused: more images than `skip_bad` cannot be read.
        """
        parts = [-(-len(source) // chunks.IMAGES) for source in sources]
        stage, sides, refused = self.store.stage("scan", self.inputs), [nothing(len(self.screens))] * 2, 0

        def enough(value: Mapping[str, Any]) -> bool:
            nonlocal refused
            refused += value["refused"]
            return bool(refused > skip_bad + LISTED)

        with stage.making() as needed:
            if needed:
                contents = (jobs(each, self.screens, self.size, lessons, side) for side, each in enumerate(sources))
                kept = Kept(stage)
                count = work_through(
                    chain.from_iterable(contents),
                    kept,
                    self.executors(score_chunk),
                    total=sum(parts),
                    title="images",
                    progress=self.progress,
                    enough=enough,
                )
                for number in range(count):
                    if (value := kept.load(number)) is not None:  # of one that was begun last there may be none
                        side = int(number >= parts[0])
                        sides[side] = added(sides[side], Summary.from_json(value))
                lines = (show(why, 1000) for side in sides for _, why in side.unreadable)
                write_text(stage.path / UNREADABLE, "".join(f"{line}\n" for line in lines))
                if not enough({"refused": 0}):
                    stage.commit({"sides": [side.as_json() for side in sides]})
            else:
                sides = [Summary.from_json(each) for each in stage.facts["sides"]]
        if stage.complete:
            remove_parts(stage)
        refused = sum(side.refused for side in sides)
        if refused > skip_bad:
            why = next(iter(sides[0].unreadable + sides[1].unreadable))[1]
            total = sum(map(len, sources))
            raise InputRefused(
                f"{refused} of {total} images cannot be read, the first: {show(why, 120)} All are listed in "
                f"{show(stage.path / UNREADABLE)}; mend or remove them, or give --skip-bad {refused}.",
                code="IMAGE-REFUSED",
            )
        return sides[0], sides[1]

    def drills(self, clean: Source, rate: float, alpha: float, seed: int) -> list[Drill]:
        """How often poisons are found, from the store or measured."""
        stage = self.store.stage("scan-drill", {**self.inputs, "rate": rate, "alpha": alpha})
        with stage.making() as needed:
            if needed:
                kept = Kept(stage)
                count = work_through(
                    drill_jobs(clean, self.screens, self.size, rate, alpha, seed),
                    kept,
                    self.executors(drill_once),
                    total=RUNS * len(attacks_for(self.size)),
                    title="drill",
                    progress=self.progress,
                )
                stage.commit({"results": [kept.load(number) for number in range(count)]})
        remove_parts(stage)
        return drills_of(stage.facts["results"], rate)


def unlike(suspects: Summary, clean: Summary) -> str | None:
    """Why the two are not of one kind, as a sentence; None where nothing says so."""
    for kind in sorted({*suspects.stored, *clean.stored}):
        one, other = (side.stored[kind] / max(1, side.stored.total()) for side in (suspects, clean))
        if abs(one - other) > UNLIKE:
            return (
                f"The clean images are of another kind: {one:.0%} of the suspects are stored as {kind}, of them "
                f"{other:.0%}. Give clean images that were stored in the same way."
            )
    one_size = [side.least if side.least == side.most else None for side in (suspects, clean)]
    if one_size[0] != one_size[1]:
        shown = ["of several sizes" if each is None else f"of {each[1]}x{each[0]} pixels" for each in one_size]
        return f"The clean images are of another kind: they are {shown[1]}, the suspects {shown[0]}. Give others."
    return None
