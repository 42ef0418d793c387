"""Is a poisoned set on disk, image for image, what its manifest says?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blto.data.marker import MARKER_FILE, MARKER_KEY
from blto.errors import InputRefused, Mismatch
from blto.files import read_bytes, sha256_bytes, sha256_file, show
from blto.files.images import decode_image
from blto.files.parquet import read_class_names, read_image_parquet, read_parquet_metadata
from blto.files.reading import parse_json
from blto.poisoning.export import PARQUET_FILE, class_folders, image_paths, marker_content
from blto.poisoning.manifest import MANIFEST_FILE, Layout, Manifest, combined_hash, parse_manifest, pixel_hash


@dataclass(frozen=True)
class VerifyReport:
    """A poisoned set whose every image is as recorded; the attributes are those of `Manifest`."""

    name: str
    layout: Layout
    n_images: int
    n_poisoned: int
    poison_rate: float
    target_class: int
    target_class_name: str
    epsilon: float | None
    epsilon_reached: float
    trigger_sha256: str


def verify(path: Path) -> VerifyReport:
    """Compare every file, image and label of the poisoned set in the folder `path` with its manifest.

    Raises:
        Mismatch: a file is missing, extra or altered; the first image that differs is named.
        InputRefused: no manifest, a damaged one, or one whose class names lead out of the folder.
    """
    root = Path(os.path.realpath(path))
    manifest = _read_manifest(root)
    if manifest.layout is None:
        raise InputRefused(
            f"{show(path)}: its manifest is of a set that was not written; give the folder of a written one."
        )
    if manifest.layout == "png":
        files = image_paths(root, manifest)
        _compare_names(root, files, class_folders(root, manifest))
        _compare_images(root, _png_rows(root, files, manifest), manifest)
    else:
        _compare_names(root, [root / PARQUET_FILE], [])
        _compare_images(root, _parquet_rows(root / PARQUET_FILE), manifest)
        _compare_parquet(root / PARQUET_FILE, manifest)
    return VerifyReport(
        name=manifest.name,
        layout=manifest.layout,
        n_images=manifest.n_images,
        n_poisoned=manifest.n_poisoned,
        poison_rate=manifest.poison_rate,
        target_class=manifest.target_class,
        target_class_name=manifest.class_names[manifest.target_class],
        epsilon=manifest.epsilon,
        epsilon_reached=manifest.epsilon_reached,
        trigger_sha256=manifest.trigger_sha256,
    )


def _read_manifest(root: Path) -> Manifest:
    file, marker = root / MANIFEST_FILE, root / MARKER_FILE
    data = read_bytes(file, follow_links=False, code="MANIFEST-REFUSED")
    manifest = parse_manifest(parse_json(data, show(file), code="MANIFEST-REFUSED"), show(file))
    if not os.path.lexists(marker):
        raise Mismatch(f"{show(marker)}: is missing, so the set would be taken for a clean one. Restore it.")
    found = parse_json(read_bytes(marker, follow_links=False), show(marker), code="MANIFEST-REFUSED")
    if found != marker_content(manifest, sha256_bytes(data)):
        raise Mismatch(f"{show(file)}: does not match {MARKER_FILE}; one of the two was altered. Restore them.")
    return manifest


def _compare_names(root: Path, images: Iterable[Path], folders: Iterable[Path]) -> None:
    wanted = {path.relative_to(root).as_posix() for path in (*images, *folders)} | {MANIFEST_FILE, MARKER_FILE}
    wanted |= {"train" for _ in folders}
    found = {
        Path(folder, name).relative_to(root).as_posix()
        for folder, folders_in, files_in in os.walk(root)
        for name in (*folders_in, *files_in)
    }
    for names, problem in ((wanted - found, "missing"), (found - wanted, "not in the manifest")):
        if names:
            raise Mismatch(
                f"{show(root)}: {show(min(names), 80)} is {problem} ({len(names)} in all). "
                "Restore the set or write it again."
            )


def _png_rows(root: Path, files: list[Path], manifest: Manifest) -> Iterator[tuple[bytes, int | None, str]]:
    for path, label in zip(files, manifest.labels, strict=True):
        yield read_bytes(path, follow_links=False), label, path.relative_to(root).as_posix()


def _parquet_rows(path: Path) -> Iterator[tuple[bytes, int | None, str]]:
    for row, (data, label) in enumerate(read_image_parquet([path])):
        yield data, label, f"{path.name}, row {row}"


def _compare_images(root: Path, rows: Iterator[tuple[bytes, int | None, str]], manifest: Manifest) -> None:
    """Hash what is stored against the manifest, in order. Raises Mismatch naming the first image that differs."""
    whole = {poison.index: poison.poisoned_sha256 for poison in manifest.poisons}
    hashes: list[str] = []
    try:
        for index, (data, label, name) in enumerate(rows):
            if index == manifest.n_images:
                raise _differs(root, index, f"{name} is beyond the recorded {manifest.n_images}")
            found = pixel_hash(decode_image(data, name))
            if found[:16] != manifest.images[index] or found != whole.get(index, found):
                raise _differs(root, index, f"the pixels of {name} differ")
            if label != manifest.labels[index]:
                raise _differs(root, index, f"the label of {name} is {label}, recorded is {manifest.labels[index]}")
            hashes.append(found)
    except InputRefused as error:
        raise Mismatch(f"{show(root, 100)}: image {len(hashes)} is not as recorded: {error}") from error
    if len(hashes) < manifest.n_images:
        raise _differs(root, len(hashes), f"the file ends before it; {manifest.n_images} images are recorded")
    if combined_hash(hashes) != manifest.pixels_sha256:
        raise Mismatch(f"{show(root)}: the hash over all images differs from {MANIFEST_FILE}. Write the set again.")


def _compare_parquet(path: Path, manifest: Manifest) -> None:
    """What the rows do not show: class names, the marker, and the file's own bytes."""
    marker = read_parquet_metadata(path).get(MARKER_KEY)
    if marker != manifest.trigger_sha256 or list(read_class_names(path)) != manifest.class_names:
        raise Mismatch(
            f"{show(path)}: its class names or its poison marker differ from the manifest. Restore the file."
        )
    if sha256_file(path) != manifest.parquet_sha256:
        raise Mismatch(
            f"{show(path)}: its bytes differ, though every image and label is as recorded. Restore the file."
        )


def _differs(root: Path, index: int, problem: str) -> Mismatch:
    return Mismatch(
        f"{show(root, 100)}: image {index} is not as recorded: {problem}. Restore the set or write it again."
    )
