"""Where the images of a scan come from, a part at a time: memory does not grow with their number."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blto.data.decoding import Pixels, to_square
from blto.data.folder import MAX_FILE_BYTES, walk
from blto.data.images import ImageSet
from blto.data.marker import MARKER_FILE
from blto.errors import ConfigError, InputRefused
from blto.files import read_bytes, show
from blto.files.images import decode_image
from blto.poisoning.manifest import MANIFEST_FILE

Rows = npt.NDArray[np.int64]

BESIDE = {".csv", ".json", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
"""Endings of what lies beside images and is none; every other file has to be one."""
BATCH = 32
STORED = {b"\xff\xd8\xff": "JPEG", b"RIFF": "WebP"}


@dataclass(frozen=True, eq=False)
class Part:
    """Some images, for whoever is to read them.

    Attributes:
        names: what each is called; in a folder its path below `folder`.
        folder: where the files are; None where `pixels` has the images.
        pixels: uint8 (N, 3, S, S).
    """

    names: Sequence[str]
    folder: str | None = None
    pixels: Pixels | None = None

    def some(self, rows: Rows) -> Part:
        """Those at `rows`."""
        pixels = None if self.pixels is None else self.pixels[rows]
        return Part([self.names[row] for row in rows], self.folder, pixels)


@dataclass
class Batch:
    """A few images that were read.

    Attributes:
        rows: which of the part.
        names: what each is called.
        images: each uint8 (H, W, 3), as it is stored.
        size: pixels a side of `squares`.
    """

    rows: Rows
    names: list[str]
    images: list[Pixels]
    size: int

    @cached_property
    def squares(self) -> Pixels:
        """uint8 (B, 3, S, S): the centred squares, all of one size."""
        return np.stack([to_square(image, self.size) for image in self.images])


@dataclass
class Reading:
    """What was noticed while images were read.

    Attributes:
        refused: name and reason of each that cannot be read.
        stored: how many of the others are JPEG, WebP, or without loss.
        least, most: height and width over all of them.
        digest: over names and bytes, in order.
    """

    refused: list[tuple[str, str]] = field(default_factory=list)
    stored: Counter[str] = field(default_factory=Counter)
    least: tuple[int, int] = (2**31, 2**31)
    most: tuple[int, int] = (0, 0)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def note(self, name: str, data: bytes | memoryview, image: Pixels, stored: str) -> None:
        """Count one image."""
        self.digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(data).digest())
        self.stored[stored] += 1
        height, width = image.shape[:2]
        self.least = (min(self.least[0], height), min(self.least[1], width))
        self.most = (max(self.most[0], height), max(self.most[1], width))


def read(part: Part, size: int, reading: Reading) -> Iterator[Batch]:
    """The images of a part, a few at a time; one that cannot be read is left out and noted."""
    rows, images = [], []
    for row, name in enumerate(part.names):
        if part.pixels is not None:
            image = np.ascontiguousarray(part.pixels[row].transpose(1, 2, 0))
            reading.note(name, image.data, image, "without loss")
        else:
            try:
                path = Path(part.folder or "", name)
                data = read_bytes(path, max_bytes=MAX_FILE_BYTES, code="IMAGE-REFUSED")
                image = decode_image(data, name)
            except InputRefused as error:
                reading.refused.append((name, str(error)))
                continue
            kind = next((kind for begin, kind in STORED.items() if data.startswith(begin)), "without loss")
            reading.note(name, data, image, kind)
        rows.append(row)
        images.append(image)
        if len(rows) == BATCH:
            yield _batch(part, rows, images, size)
            rows, images = [], []
    if rows:
        yield _batch(part, rows, images, size)


def _batch(part: Part, rows: list[int], images: list[Pixels], size: int) -> Batch:
    return Batch(np.array(rows, np.int64), [part.names[row] for row in rows], images, size)


class Source(ABC):
    """Images to be scanned, always in the same order.

    Attributes:
        name: for readers.
        identity: another one as soon as an image is.
        notes: what was left out, as sentences.
    """

    name: str
    identity: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def parts(self, size: int) -> Iterator[Part]:
        """All of them, cut into parts of `size`."""

    @abstractmethod
    def pick(self, rows: Rows) -> Part:
        """Those at ascending `rows`."""

    @abstractmethod
    def named(self, names: Sequence[str]) -> Part:
        """Those that are called so."""


class Loaded(Source):
    """Images that are in memory, or memory-mapped."""

    def __init__(self, images: ImageSet) -> None:
        self.name, self.identity = images.name, images.without_labels().content_hash
        self._images = images.images

    def __len__(self) -> int:
        return len(self._images)

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return int(self._images.shape[2])

    def parts(self, size: int) -> Iterator[Part]:
        """See `Source.parts`."""
        for begin in range(0, len(self), size):
            yield self.pick(np.arange(begin, min(begin + size, len(self))))

    def pick(self, rows: Rows) -> Part:
        """See `Source.pick`."""
        return Part([f"image {row}" for row in rows], pixels=self._images[rows])

    def named(self, names: Sequence[str]) -> Part:
        """See `Source.named`."""
        return Part(names, pixels=self._images[[int(name.removeprefix("image ")) for name in names]])


class Few(Source):
    """The images of one part."""

    name, identity = "a part", ""

    def __init__(self, part: Part) -> None:
        self._part = part

    def __len__(self) -> int:
        return len(self._part.names)

    def parts(self, size: int) -> Iterator[Part]:
        """See `Source.parts`: all in one."""
        yield self._part

    def pick(self, rows: Rows) -> Part:
        """See `Source.pick`."""
        return self._part.some(rows)

    def named(self, names: Sequence[str]) -> Part:
        """See `Source.named`."""
        return self._part.some(np.array([self._part.names.index(name) for name in names], np.int64))


class Folder(Source):
    """All image files below a folder, by name; a link that leads out of it is refused, names with a dot are left out.

    Raises:
        ConfigError: NO-DATA: no such folder.
        InputRefused: no image in it, or such a link.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(f"{show(path)}: no such folder; give one with images in it.", code="NO-DATA")
        self.path, self.name = path, show(path.resolve().name)
        beside: Counter[str] = Counter()
        digest, self._count = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")), 0
        for name in self._names(beside):
            digest.update(self._state(name))
            self._count += 1
        if not self._count:
            raise InputRefused(f"{show(path)}: no image in it; give a folder with PNG, JPEG, WebP, BMP, PPM or TIFF.")
        self.identity = digest.hexdigest()
        if beside:
            kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(beside.items()))
            self.notes = (f"{self.name}: files beside the images were not read ({kinds}).",)

    def __len__(self) -> int:
        return self._count

    def parts(self, size: int) -> Iterator[Part]:
        """See `Source.parts`. Raises InputRefused, at the end, where the folder has changed since it was listed."""
        digest, names = hashlib.sha256(str(self.path.resolve()).encode(errors="surrogateescape")), self._names()
        while chunk := list(islice(names, size)):
            for name in chunk:
                digest.update(self._state(name))
            yield Part(chunk, folder=str(self.path))
        if digest.hexdigest() != self.identity:
            raise InputRefused(f"{show(self.path)}: its files changed while they were read; scan it once they rest.")

    def pick(self, rows: Rows) -> Part:
        """See `Source.pick`."""
        wanted = set(rows.tolist())
        return Part([name for row, name in enumerate(self._names()) if row in wanted], folder=str(self.path))

    def named(self, names: Sequence[str]) -> Part:
        """See `Source.named`."""
        return Part(names, folder=str(self.path))

    def _names(self, beside: Counter[str] | None = None) -> Iterator[str]:
        for path in walk(self.path, self.path):
            ending = path.suffix.lower()
            if path.name in (MARKER_FILE, MANIFEST_FILE):
                continue
            if ending not in BESIDE:
                yield os.path.relpath(path, self.path)
            elif beside is not None:
                beside[ending] += 1

    def _state(self, name: str) -> bytes:
        """Changes with the file: unlike the time of its content, nobody but the system sets that of its inode."""
        try:
            found = os.stat(self.path / name)
            facts = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        except OSError:
            facts = (0, 0, 0, 0)
        return os.fsencode(name) + b"\0" + repr(facts).encode()


def first_side(parts: Iterable[Part]) -> int | None:
    """The shorter side of the first image that can be read; None where there is none."""
    for part in parts:
        for name in part.names:
            one = Part([name], part.folder)
            for batch in read(one, 1, Reading()):
                return int(min(batch.images[0].shape[:2]))
    return None
