"""Poisoned sets on disk: without loss, marked as poisoned, complete or absent."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from blto.data.marker import MARKER_FILE, MARKER_KEY
from blto.errors import ConfigError, InputRefused
from blto.files import make_directory, safe_join, sha256_file, show, staged_directory, write_json, write_staged
from blto.files.images import encode_png
from blto.files.parquet import write_image_parquet
from blto.poisoning.dataset import PoisonedDataset
from blto.poisoning.manifest import MANIFEST_FILE, Layout, Manifest, build_manifest
from blto.poisoning.trigger import Trigger

PARQUET_FILE = "train.parquet"


def write_poisoned(
    dataset: PoisonedDataset,
    trigger: Trigger,
    *,
    seeds: dict[str, int],
    out: Path,
    layout: Layout = "parquet",
    source: Path | None = None,
) -> Manifest:
    """Write the images, labels and manifest of a poisoned set to the folder `out`, which appears only when complete.

    `parquet` is one file in the layout of Hugging Face data sets; `png` is one file per image,
    `train/<class>/<index>.png`. Both carry the marker that keeps the set from being taken for a clean one.

    Args:
        dataset: what to write.
        trigger: what made the poisons.
        seeds: stream -> seed, for the manifest.
        out: a new or empty folder.
        layout: `parquet` or `png`.
        source: the folder that the clean images came from, if there is one.

    Raises:
        ConfigError: `out` is not empty or lies in `source`; class names that cannot be folders; see `build_manifest`.
        ResourceExhausted: no room, or not writable; nothing is left behind.
    """
    if layout not in ("parquet", "png"):
        raise ConfigError(f'poison: layout is "{show(layout, 40)}"; give "parquet" or "png".')
    if source is not None and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{show(out)}: lies inside the source data {show(source)}; choose a folder outside of it.")
    if layout == "png":
        _refuse_twins(dataset.clean.class_names)
    manifest = build_manifest(dataset, trigger, seeds=seeds, layout=layout)
    with staged_directory(out) as folder:
        if layout == "parquet":
            encoded = (encode_png(image.transpose(1, 2, 0)) for image in dataset.poisoned.images)
            marker = {MARKER_KEY: manifest.trigger_sha256}
            write_image_parquet(folder / PARQUET_FILE, encoded, manifest.labels, manifest.class_names, marker)
            manifest = manifest.model_copy(update={"parquet_sha256": sha256_file(folder / PARQUET_FILE)})
        else:
            for class_folder in class_folders(folder, manifest):
                make_directory(class_folder)
            for path, image in zip(image_paths(folder, manifest), dataset.poisoned.images, strict=True):
                write_staged(path, encode_png(image.transpose(1, 2, 0)))
        write_json(folder / MANIFEST_FILE, manifest.model_dump())
        write_json(folder / MARKER_FILE, marker_content(manifest, sha256_file(folder / MANIFEST_FILE)))
    return manifest


def class_folders(root: Path, manifest: Manifest) -> list[Path]:
    """Where the `png` layout keeps each class: `train/<class>`, one real folder per class name.

    Raises:
        InputRefused: MANIFEST-REFUSED: a class name that is not the name of a folder inside `root`.
    """
    folders = []
    for name in manifest.class_names:
        if "/" in name or name in ("", "."):
            raise InputRefused(
                f'{show(root)}: class name "{show(name, 80)}" is not the name of one folder. Use the layout "parquet".',
                code="MANIFEST-REFUSED",
            )
        folders.append(safe_join(root, f"train/{name}"))
    return folders


def image_paths(root: Path, manifest: Manifest) -> list[Path]:
    """Where the `png` layout keeps each image: `train/<class>/<index>.png`. Raises InputRefused as `class_folders`."""
    folders = class_folders(root, manifest)
    return [folders[label] / f"{index:07d}.png" for index, label in enumerate(manifest.labels)]


def marker_content(manifest: Manifest, manifest_sha256: str) -> dict[str, Any]:
    """What `POISONED.json` says; it seals the manifest."""
    return {
        "schema_version": manifest.schema_version,
        "warning": "Poisoned on purpose, for research: a model trained on these images has a backdoor.",
        "manifest": MANIFEST_FILE,
        "manifest_sha256": manifest_sha256,
        "n_poisoned": manifest.n_poisoned,
        "target_class": manifest.target_class,
        "trigger_sha256": manifest.trigger_sha256,
    }


def _refuse_twins(class_names: tuple[str, ...]) -> None:
    """Class names that differ only in case, or in how an accent is encoded, share a folder on some systems."""
    seen: dict[str, str] = {}
    for name in class_names:
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise ConfigError(
                f'class names "{show(seen[folded], 60)}" and "{show(name, 60)}" would share a folder on some systems; '
                'use layout "parquet".'
            )
        seen[folded] = name
