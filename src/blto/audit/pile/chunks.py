"""The work on a part of a scan's images, and what comes of it: small, and the same wherever it runs."""

from __future__ import annotations

import hashlib
import heapq
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np

from blto.audit.pile.comparison import place_of
from blto.audit.pile.lessons import NONE, Lesson
from blto.audit.pile.screens import Learned, Screen, build_screens
from blto.audit.pile.sources import Batch, Reading, Rows, Source, read
from blto.runtime.jobs import Tell

IMAGES = 1024
"""Of a chunk: what a kill may cost."""
TOP = 100
LISTED = 1000
"""Most images that cannot be read of which the names are kept."""


@dataclass
class Summary:
    """What is known of some images after they were scored. Two add up to one, and nothing grows with their number.

    Attributes:
        count: of images that were scored.
        refused: how many cannot be read.
        unreadable: name and reason of the first of those.
        histograms: by detector, how many images have a score at each place of `comparison.place_of`.
        tops: by detector, score and name of the most suspicious images, the first one most.
        stored: how many are JPEG, WebP, or without loss.
        least, most: height and width over all.
        digest: over names and bytes, in order.
        seconds: of computing, by detector.
    """

    count: int = 0
    refused: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    histograms: list[Counter[int]] = field(default_factory=list)
    tops: list[list[tuple[float, str]]] = field(default_factory=list)
    stored: Counter[str] = field(default_factory=Counter)
    least: tuple[int, int] = (2**31, 2**31)
    most: tuple[int, int] = (0, 0)
    digest: str = ""
    seconds: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is the way back."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        histograms = [{str(place): count for place, count in sorted(each.items())} for each in self.histograms]
        return {**plain, "histograms": histograms, "stored": dict(sorted(self.stored.items()))}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Summary:
        """A summary from plain data."""
        return cls(
            count=plain["count"],
            refused=plain["refused"],
            unreadable=[(name, reason) for name, reason in plain["unreadable"]],
            histograms=[Counter({int(place): n for place, n in each.items()}) for each in plain["histograms"]],
            tops=[[(score, name) for score, name in each] for each in plain["tops"]],
            stored=Counter(plain["stored"]),
            least=tuple(plain["least"]),
            most=tuple(plain["most"]),
            digest=plain["digest"],
            seconds=list(plain["seconds"]),
        )


def added(first: Summary, second: Summary) -> Summary:
    """Both together, in this order."""
    return Summary(
        count=first.count + second.count,
        refused=first.refused + second.refused,
        unreadable=(first.unreadable + second.unreadable)[:LISTED],
        histograms=[one + other for one, other in zip(first.histograms, second.histograms, strict=True)],
        tops=[_first(one + other) for one, other in zip(first.tops, second.tops, strict=True)],
        stored=first.stored + second.stored,
        least=(min(first.least[0], second.least[0]), min(first.least[1], second.least[1])),
        most=(max(first.most[0], second.most[0]), max(first.most[1], second.most[1])),
        digest=hashlib.sha256((first.digest + second.digest).encode()).hexdigest(),
        seconds=[one + other for one, other in zip(first.seconds, second.seconds, strict=True)],
    )


def nothing(screens: int) -> Summary:
    """The summary of no images."""
    return Summary(histograms=[Counter()] * screens, tops=[[]] * screens, seconds=[0.0] * screens)


def _first(scored: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The most suspicious; of equal ones those that came first."""
    return heapq.nlargest(TOP, scored, key=itemgetter(0))


def jobs(source: Source, screens: Sequence[Screen], size: int, lessons: Sequence[Lesson], side: int) -> Iterator[Any]:
    """The content of the jobs of a source, for `score_chunk`, in order.

    Args:
        source: the images.
        screens, lessons: the detectors and what each has learned.
        size: of squares.
        side: of the lessons' rows: 0 where the source is the suspects, 1 where it is the clean images.
    """
    begin = 0
    for part in source.parts(IMAGES):
        end = begin + len(part.names)
        given = zip(screens, lessons, strict=True)
        owns = [lesson.own[side] if side or screen.from_all else NONE for screen, lesson in given]
        yield {
            "part": part,
            "size": size,
            "detectors": [screen.spec for screen in screens],
            "learned": [lesson.learned for lesson in lessons],
            "own": [own[np.searchsorted(own, begin) : np.searchsorted(own, end)] - begin for own in owns],
        }
        begin = end


def score_chunk(content: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Score the images of one part; the summary as plain data."""
    reading = Reading()
    batches = read(content["part"], content["size"], reading)
    found = summarize(build_screens(content["detectors"]), batches, content["learned"], content["own"])
    found.refused, found.unreadable = len(reading.refused), reading.refused
    found.stored, found.least, found.most = reading.stored, reading.least, reading.most
    found.digest = reading.digest.hexdigest()
    return found.as_json()


def summarize(
    screens: Sequence[Screen], batches: Iterable[Batch], learned: Sequence[Learned], owns: Sequence[Rows]
) -> Summary:
    """Score batches. An image that a detector has learned from as a clean one is left out of all counts.

    Args:
        screens: the detectors.
        batches: the images.
        learned: by each detector.
        owns: the rows that each has learned from.
    """
    total = nothing(len(screens))
    left_out = np.concatenate([own for screen, own in zip(screens, owns, strict=True) if not screen.from_all] + [NONE])
    scored: list[list[tuple[float, str]]] = [[] for _ in screens]
    for batch in batches:
        kept = ~np.isin(batch.rows, left_out)
        total.count += int(kept.sum())
        for number, screen in enumerate(screens):
            started = time.monotonic()
            scores = screen.score(batch, learned[number], np.isin(batch.rows, owns[number]))
            total.seconds[number] += time.monotonic() - started
            rounded = [round(float(score), 4) for score in scores]
            total.histograms[number] = total.histograms[number] + Counter(
                place_of(score) for score, keep in zip(rounded, kept, strict=True) if keep
            )
            scored[number] += [
                (score, name) for score, name, keep in zip(rounded, batch.names, kept, strict=True) if keep
            ]
    total.tops = [_first(each) for each in scored]
    return total
