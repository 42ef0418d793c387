"""The detectors of a scan: each learns from a fixed number of images, then scores any number of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from blto.audit.pile.sources import Batch
from blto.defenses import DEFENSES
from blto.defenses.base import Defense, Scores
from blto.defenses.frequency_screening import FrequencyScreening, coefficients, largest_deviation, typical
from blto.defenses.repeated_windows import RepeatedWindows, count_images, sharing
from blto.errors import ConfigError, InputRefused

Learned = Mapping[str, npt.NDArray[Any]]
USUAL = ({"name": "frequency_screening"}, {"name": "repeated_windows"})
MOST_VALUES = 2**25
"""Coefficients that are held at once while medians are taken: what is learned from large images comes from fewer."""


class Screen(ABC):
    """A detector that can be asked about images a few at a time.

    Attributes:
        spec: resolved, as in DEFENSES.
        title, summary: of its card.
        from_all: whether it learns from suspects and clean images together, in which case an image that it has learned
            from is scored like any other; else from clean ones alone, which are then not scored.
    """

    from_all: bool

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = dict(spec)
        card = DEFENSES.card(spec["name"])
        self.title, self.summary = card.title, card.summary

    @abstractmethod
    def wanted(self, size: int) -> int:
        """From how many images it learns, where squares have `size` pixels a side."""

    @abstractmethod
    def learn(self, batches: Iterable[Batch]) -> Learned:
        """What it makes of them, as arrays. Raises InputRefused for too few."""

    @abstractmethod
    def score(self, batch: Batch, learned: Learned, own: npt.NDArray[np.bool_]) -> Scores:
        """One number an image, larger for the more suspicious; `own` are those that it has learned from."""


class FrequencyScreen(Screen):
    """`FrequencyScreening`, with medians and spreads of clean images."""

    from_all = False

    def __init__(self, spec: Mapping[str, Any], defense: FrequencyScreening) -> None:
        super().__init__(spec)
        self._defense = defense

    def wanted(self, size: int) -> int:
        """See `Screen.wanted`."""
        return min(self._defense.reference, MOST_VALUES // (3 * size * size))

    def learn(self, batches: Iterable[Batch]) -> Learned:
        """See `Screen.learn`."""
        found = [coefficients(torch.from_numpy(batch.squares)).float() for batch in batches]
        count = sum(map(len, found))
        if count < 10:
            raise InputRefused(f"{self.title}: {count} images to learn from; it needs 10, give more images.")
        median, spread = typical(torch.cat(found))
        return {"median": median.numpy(), "spread": spread.numpy()}

    def score(self, batch: Batch, learned: Learned, own: npt.NDArray[np.bool_]) -> Scores:
        """See `Screen.score`."""
        usual = (torch.from_numpy(learned[name]) for name in ("median", "spread"))
        found = largest_deviation(coefficients(torch.from_numpy(batch.squares)).float(), *usual)
        return found.double().numpy()


class WindowScreen(Screen):
    """`RepeatedWindows`, counted over suspects and clean images together."""

    from_all = True

    def __init__(self, spec: Mapping[str, Any], defense: RepeatedWindows) -> None:
        super().__init__(spec)
        self._defense = defense

    def wanted(self, size: int) -> int:
        """See `Screen.wanted`."""
        return self._defense.sample

    def learn(self, batches: Iterable[Batch]) -> Learned:
        """See `Screen.learn`."""
        hashes, counts = count_images(
            self._defense.hashes(group) for batch in batches for _, group in _by_shape(batch.images)
        )
        return {"hashes": hashes.view(np.int64), "counts": counts}

    def score(self, batch: Batch, learned: Learned, own: npt.NDArray[np.bool_]) -> Scores:
        """See `Screen.score`."""
        table, scores = (learned["hashes"].view(np.uint64), learned["counts"]), np.zeros(len(batch.images))
        for rows, group in _by_shape(batch.images):
            scores[rows] = sharing(self._defense.hashes(group), table, own[rows])
        return scores


def _by_shape(images: Sequence[npt.NDArray[np.uint8]]) -> Iterable[tuple[list[int], npt.NDArray[np.uint8]]]:
    """The images of each size as one array, and which they are."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    return [(found, np.stack([images[row] for row in found])) for found in rows.values()]


def build_screens(specs: Sequence[str | Mapping[str, Any]]) -> list[Screen]:
    """Screens from entries of DEFENSES. Raises ConfigError for one that does not score images by their pixels alone."""
    kinds: dict[type[Defense], type[FrequencyScreen] | type[WindowScreen]] = {
        FrequencyScreening: FrequencyScreen,
        RepeatedWindows: WindowScreen,
    }
    screens: list[Screen] = []
    for spec in specs:
        resolved = DEFENSES.resolve(spec, "--detector")
        defense = DEFENSES.build(resolved)
        if type(defense) not in kinds:
            known = ", ".join(each["name"] for each in USUAL)
            raise ConfigError(f"--detector {resolved['name']}: it cannot scan images a few at a time; give {known}.")
        screens.append(kinds[type(defense)](resolved, defense))  # type: ignore[arg-type]  # each takes its own
    if len({screen.spec["name"] for screen in screens}) < len(screens):
        raise ConfigError("--detector: one is given twice; give each once.")
    return screens
