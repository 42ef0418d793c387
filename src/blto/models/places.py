"""Where in a checkpoint an architecture's tensors are: under which path, behind which prefix, in which spelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from blto.models.spellings import Spelling

PREFERRED = ("encoder_q", "online", "teacher", "student", "backbone", "encoder")
"""Of several nets that fit equally well, the one whose place has one of these as a part of its path, or as the
beginning of one, the first first."""
LONGEST_NAME = 512


@dataclass(frozen=True)
class Place:
    """A group of a checkpoint, a prefix of names in it, and how what follows is spelled."""

    group: str
    prefix: str
    spelling: str

    def __str__(self) -> str:
        return ".".join(part for part in (self.group, self.prefix.rstrip(".")) if part) or "the whole file"


def search(
    groups: Mapping[str, Mapping[str, tuple[int, ...]]],
    wanted: Mapping[str, tuple[int, ...]],
    spellings: Mapping[str, Spelling],
    key_prefix: str | None,
) -> dict[Place, dict[str, str]]:
    """For each place the tensors that fit there by name and shape: the architecture's name -> the file's.

    A place at which two tensors fit one name is left out: it is not one net.

    Args:
        groups: of a checkpoint, see `Checkpoint`.
        wanted: the architecture's names and shapes.
        spellings: see `spellings.spellings_of`.
        key_prefix: only the places with that prefix of names, or with that path in the file.
    """
    most_dots = max(name.count(".") for name in wanted)
    found: dict[Place, dict[str, str]] = {}
    mixed: set[Place] = set()
    for group, shapes in groups.items():
        for name, shape in shapes.items():
            for prefix, rest in _divisions(name, most_dots):
                for spelling, respelled in spellings.items():
                    place, target = Place(group, prefix, spelling), respelled(rest)
                    respelt = target != rest or respelled is str  # else the plain spelling finds it too
                    if wanted.get(target) != shape or not respelt or not _is_asked_for(place, key_prefix):
                        continue
                    if found.setdefault(place, {}).setdefault(target, name) != name:
                        mixed.add(place)
    return {place: names for place, names in found.items() if place not in mixed}


def _is_asked_for(place: Place, key_prefix: str | None) -> bool:
    """Whether the place is the one with that prefix of names, or with that path in the file."""
    return key_prefix is None or key_prefix.rstrip(".") in (place.prefix.rstrip("."), str(place))


def _divisions(name: str, most_dots: int) -> Iterator[tuple[str, str]]:
    """Every way to read a dotted name as a prefix, with its dot, and a rest of at most so many dots."""
    if len(name) > LONGEST_NAME:
        return
    parts = name.split(".")
    for count in range(1, min(len(parts), most_dots + 1) + 1):
        rest = ".".join(parts[-count:])
        yield name[: len(name) - len(rest)], rest


def preference(place: Place) -> int:
    """The rank of a place among those that fit equally well."""
    parts = f"{place.group}.{place.prefix}".split(".")
    for rank, word in enumerate(PREFERRED):
        if word in parts:
            return 2 * rank
        if any(part.startswith(word) for part in parts):
            return 2 * rank + 1
    return 2 * len(PREFERRED)
