"""What each detector learns before a scan, from images that are drawn without regard to what they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from blto.audit.pile.screens import Learned, Screen
from blto.audit.pile.sources import Batch, Part, Rows, Source
from blto.files import remove_leftovers
from blto.files.safetensors import read_safetensors, write_safetensors
from blto.records import StageFolder
from blto.runtime.interrupts import heed_signals
from blto.runtime.seeds import numpy_generator

FILE = "learned.safetensors"
NONE: Rows = np.zeros(0, np.int64)
Reader = Callable[[Part], Iterator[Batch]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a detector has learned, and the ascending rows that it has seen among suspects and among clean images."""

    learned: Learned
    own: tuple[Rows, Rows]


def draw(wanted: int, count: int, seed: int, *purpose: int | str) -> Rows:
    """Ascending rows of so many among `count`, all where there are fewer."""
    generator = numpy_generator(seed, "defense", *purpose)
    return np.sort(generator.choice(count, min(wanted, count), replace=False))


def syllabus(screens: list[Screen], suspects: int, clean: int, size: int, seed: int) -> list[tuple[Rows, Rows]]:
    """For each detector the rows among suspects and among clean images that it is to learn from.

    What learns from clean images alone gets at most a quarter of them, and these are in no comparison; so what learns
    from all learns from all others. Without clean images the suspects stand in for them.
    """
    alone = max((screen.wanted(size) for screen in screens if not screen.from_all), default=0)
    apart = draw(min(alone, clean // 4), clean, seed, "clean") if clean else NONE
    plan = []
    for screen in screens:
        if screen.from_all:
            drawn = draw(screen.wanted(size), suspects + clean - len(apart), seed, "all")
            border = int(np.searchsorted(drawn, suspects))
            plan.append((drawn[:border], _skipping(drawn[border:] - suspects, apart)))
        elif clean:
            plan.append((NONE, apart))
        else:
            plan.append((draw(screen.wanted(size), suspects, seed, "clean"), NONE))
    return plan


def _skipping(places: Rows, apart: Rows) -> Rows:
    """The rows at these places among those that are not `apart`, which is ascending."""
    return places + np.searchsorted(apart - np.arange(len(apart)), places, side="right")


def learn(
    screen: Screen, rows: tuple[Rows, Rows], sources: tuple[Source, Source | None], readers: tuple[Reader, Reader]
) -> Lesson:
    """Let a detector learn from rows of either source. Raises InputRefused for too few, Interrupted at a signal."""
    parts = [source.pick(each) for source, each in zip(sources, rows, strict=True) if source is not None and len(each)]
    given = [reader for reader, each in zip(readers, rows, strict=True) if len(each)]
    batches = chain.from_iterable(reader(part) for reader, part in zip(given, parts, strict=True))
    return Lesson(screen.learn(_heeding(batches)), rows)


def learn_once(stage: StageFolder, make: Callable[[], Lesson], rows: tuple[Rows, Rows]) -> Lesson:
    """A lesson from a stage, made where it is not there."""
    with stage.making() as needed:
        if needed:
            remove_leftovers(stage.path)
            write_safetensors(stage.path / FILE, make().learned, {})
            stage.commit({})
    return Lesson({name: value.copy() for name, value in read_safetensors(stage.path / FILE)[0].items()}, rows)


def _heeding(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        heed_signals()
        yield batch
