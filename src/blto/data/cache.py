"""Decoded images kept on disk and memory-mapped, so that a set is decoded once.

An entry is named by the content of its source files, so a changed file is never answered with old pixels, and it
carries a checksum of its own, so a damaged entry is never used. The folder is the variable BLTO_CACHE or ~/.cache/blto;
nothing in it is needed, and it may be removed at any time.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blto.data.images import ImageSet
from blto.errors import BltoError, ConfigError, InputRefused, ResourceExhausted
from blto.files import (
    canonical_json,
    read_json,
    sha256_bytes,
    sha256_file,
    show,
    staged_directory,
    write_json,
    write_staged,
)
from blto.runtime.progress import Progress

FORMAT = 1  # raise it when the decoding or an entry's files change
IMAGES, LABELS, FACTS = "images.npy", "labels.npy", "facts.json"
_told: set[Path] = set()


def cache_folder() -> Path:
    """Where decoded images and downloads are kept."""
    given = os.environ.get("BLTO_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "blto"


def files_key(paths: Sequence[Path], **settings: Any) -> str:
    """A key from the bytes of the files, in order, and the settings that decide how they are decoded."""
    content = {"format": FORMAT, "files": [sha256_file(path) for path in paths], **settings}
    return sha256_bytes(canonical_json(content))


def cached(key: Callable[[], str], decode: Callable[[], ImageSet]) -> ImageSet:
    """The set that `decode` reads, from the cache where it is there, else decoded and kept.

    The images come memory-mapped, copy on write. A cache that cannot be written or is damaged costs one line on
    standard error, and the set is decoded into memory.

    Args:
        key: names the content of the source; asked again after decoding.
        decode: reads the source.

    Raises:
        InputRefused: the source changed while it was read; and whatever `decode` raises.
    """
    name = key()
    folder = cache_folder() / "images" / name
    if os.path.lexists(folder):
        try:
            return _read(folder)
        except (BltoError, OSError, ValueError, KeyError, TypeError) as error:
            _warn(f"{show(folder)}: damaged ({show(error, 80)}) and not used; remove it to have it made anew.")
            return _decode(name, key, decode)
    images = _decode(name, key, decode)
    try:
        _write(folder, images)
    except ResourceExhausted as error:
        _warn_not_kept(cache_folder(), error)
        return images
    except ConfigError:
        pass  # another process has just written the same entry
    return _read(folder)


def _decode(name: str, key: Callable[[], str], decode: Callable[[], ImageSet]) -> ImageSet:
    images = decode()
    if key() != name:
        raise InputRefused(f"{show(images.name)}: its files changed while they were read; run again once they rest.")
    return images


def _write(folder: Path, images: ImageSet) -> None:
    arrays = {IMAGES: images.images} | ({} if images.labels is None else {LABELS: images.labels})
    facts: dict[str, Any] = {"name": images.name, "class_names": images.class_names, "sha256": {}}
    with staged_directory(folder) as staged:
        for file, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            data = buffer.getvalue()
            facts["sha256"][file] = sha256_bytes(data)
            write_staged(staged / file, data)
        write_json(staged / FACTS, facts)


def _read(folder: Path) -> ImageSet:
    facts = read_json(folder / FACTS)
    has_labels = LABELS in facts["sha256"]
    for file in (IMAGES, LABELS) if has_labels else (IMAGES,):
        if sha256_file(folder / file) != facts["sha256"][file]:
            raise ValueError(f"{file} is not as it was written")
    images = map_array(folder / IMAGES)
    labels = np.load(folder / LABELS) if has_labels else None
    return ImageSet(images, labels, tuple(facts["class_names"]), facts["name"])


def map_array(path: Path) -> npt.NDArray[Any]:
    """The array in a .npy file, memory-mapped and without a way to change the file.

    Copy on write, where the system lends so much: the array then counts as writable, as torch wants it. For a file
    larger than its memory Linux refuses that, and it is mapped read-only.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="c"))
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return np.asarray(np.load(path, mmap_mode="r"))


def _warn_not_kept(folder: Path, error: ResourceExhausted) -> None:
    """Once a process and folder: training and test images would say the same."""
    if folder not in _told:
        _told.add(folder)
        reason = getattr(error.__cause__, "strerror", None) or error.code
        _warn(
            f"decoded images are not kept in {show(folder)} ({reason}) and will be decoded again; "
            "set BLTO_CACHE to a folder that can be written."
        )


def _warn(message: str) -> None:
    Progress().say(f"blto: warning: {message}")
