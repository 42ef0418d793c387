"""The drill: halves of the clean images, one of them poisoned by blto, scanned as the suspects are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from blto.attacks import ATTACKS
from blto.attacks.base import Surroundings
from blto.audit.pile.chunks import summarize
from blto.audit.pile.comparison import Drill, Found, look, smallest_p, usable_shares
from blto.audit.pile.lessons import draw, learn, syllabus
from blto.audit.pile.screens import Screen, build_screens
from blto.audit.pile.sources import Batch, Few, Part, Reading, Source, read
from blto.data.images import ImageSet
from blto.errors import ConfigError
from blto.poisoning import Trigger, apply_to_uint8
from blto.runtime.jobs import Tell

RUNS = 10
"""Of each attack."""
IMAGES, BYTES = 8192, 2**28
"""Most clean images of a run, and most bytes of them where they are in memory."""


def attacks_for(size: int) -> list[dict[str, Any]]:
    """The attacks of a drill on images of so many pixels a side: the two whose traces the usual detectors look for."""
    ctrl: dict[str, Any] = {"name": "ctrl", "target_class": 0}
    if size % 32:
        ctrl |= {"window": size, "positions": [size // 2 - 1, size - 1]}
    return [{"name": "ssl_backdoor", "target_class": 0}, ctrl]


def drill_jobs(
    clean: Source, screens: Sequence[Screen], size: int, rate: float, alpha: float, seed: int
) -> Iterator[Any]:
    """The content of the jobs, for `drill_once`: `RUNS` of each attack. Raises ConfigError for too low a rate."""
    most = min(IMAGES, BYTES // (3 * size * size))
    if round(rate * (min(most, len(clean)) // 2)) < 1:
        raise ConfigError(
            f"--drill {rate:g}: less than one of {min(most, len(clean)) // 2} images; give a higher rate."
        )
    for attack in attacks_for(size):
        for run in range(RUNS):
            yield {
                "part": clean.pick(draw(most, len(clean), seed, "drill", run)),
                "size": size,
                "detectors": [screen.spec for screen in screens],
                "attack": attack,
                "rate": rate,
                "alpha": alpha,
                "seed": seed,
                "run": run,
            }


def drill_once(content: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Poison a part of half of the images, whatever they show, and scan that half beside the other one.

    Returns:
        Whether that was found at the error rate, and how many images there were on either side.
    """
    part, size, seed, run = (content[name] for name in ("part", "size", "seed", "run"))
    screens, count = build_screens(content["detectors"]), len(part.names)
    rows = draw(count // 2, count, seed, "drill", run, "suspects")
    suspects, clean = Few(part.some(rows)), Few(part.some(np.setdiff1d(np.arange(count), rows)))
    poisons = draw(round(content["rate"] * len(suspects)), len(suspects), seed, "drill", run, "poisons")
    names = {suspects.pick(poisons).names[place] for place in range(len(poisons))}
    trigger = _trigger(content["attack"], size, seed)

    def as_squares(given: Part) -> Iterator[Batch]:
        for batch in read(given, size, Reading()):
            yield replace(batch, images=list(batch.squares.transpose(0, 2, 3, 1)))

    def poisoned(given: Part) -> Iterator[Batch]:
        for batch in as_squares(given):
            chosen = [place for place, name in enumerate(batch.names) if name in names]
            squares = batch.squares
            squares[chosen] = apply_to_uint8(trigger, squares[chosen])
            yield replace(batch, images=list(squares.transpose(0, 2, 3, 1)))

    plan = syllabus(screens, len(suspects), len(clean), size, seed)
    lessons = [
        learn(screen, own, (suspects, clean), (poisoned, as_squares)) for screen, own in zip(screens, plan, strict=True)
    ]
    learned = [lesson.learned for lesson in lessons]
    sides = [
        summarize(
            screens, reader(source.pick(np.arange(len(source)))), learned, [lesson.own[side] for lesson in lessons]
        )
        for side, (source, reader) in enumerate(((suspects, poisoned), (clean, as_squares)))
    ]
    shares = usable_shares(sides[1].count, sides[0].count, len(screens), content["alpha"])
    found = [
        Found(screen.spec["name"], screen.title, look(one, other, shares))
        for screen, one, other in zip(screens, sides[0].histograms, sides[1].histograms, strict=True)
    ]
    p_value = smallest_p(found)
    return {
        "found": p_value is not None and p_value <= content["alpha"],
        "attack": ATTACKS.card(content["attack"]["name"]).title,
        "suspects": sides[0].count,
        "clean": sides[1].count,
    }


def drills_of(results: Sequence[Mapping[str, Any]], rate: float) -> list[Drill]:
    """What the jobs' results add up to, an entry for each attack."""
    drills = []
    for attack in dict.fromkeys(result["attack"] for result in results):
        own = [result for result in results if result["attack"] == attack]
        found = sum(result["found"] for result in own)
        drills.append(Drill(attack, rate, found, len(own), own[0]["suspects"], own[0]["clean"]))
    return drills


def _trigger(spec: Mapping[str, Any], size: int, seed: int) -> Trigger:
    """An attack's trigger for images of `size` pixels a side; it learns nothing from images."""
    attack = ATTACKS.build(spec)
    shape = ImageSet(np.zeros((1, 3, size, size), np.uint8), np.zeros(1, np.int64), ("any",), "a drill's images")
    attack.check_images(shape)
    return attack.train_trigger(shape, seed=seed, surroundings=Surroundings("cpu")).trigger
