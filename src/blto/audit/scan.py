"""`blto.scan` and `blto.scan_data`, behind `blto scan`: from paths and names to a result and its files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from blto import data as datasets
from blto.audit.encoder import EncoderScan, scan_encoder
from blto.audit.page import render_page
from blto.audit.pile.chunks import score_chunk
from blto.audit.pile.page import render_pile_page
from blto.audit.pile.scan import DataScan, scan_pile
from blto.audit.pile.screens import USUAL
from blto.audit.pile.sources import Folder, Loaded, Source
from blto.audit.sarif import as_sarif
from blto.configuration import AnyPath, Options, environment
from blto.data.images import Split
from blto.data.parquet import find_parquet
from blto.experiment import Environment
from blto.files import make_directory, write_json, write_text
from blto.runtime.executors import WITH_RAY, build_executor


def scan(
    encoder: AnyPath,
    arch: str | None = None,
    *,
    data: str | Mapping[str, Any] = "cifar10",
    clean: Sequence[AnyPath] = (),
    detectors: Sequence[str | Mapping[str, Any]] | None = None,
    drill: int = 0,
    alpha: float = 0.05,
    seed: int = 0,
    page: AnyPath | None = None,
    sarif: AnyPath | None = None,
    foreign: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> EncoderScan:
    """Is this encoder backdoored, and how sure is that? See docs/scan.md.

    Args:
        encoder: its file: one that blto wrote, or with `arch` one of others, of which nothing is run.
        arch: an entry of BACKBONES, "timm/..." or "torchvision/...".
        data: the images that detectors are shown: the test part of an entry of DATASETS, without labels.
        clean: files of encoders of the same family that are known to be clean. A p-value of 0.05 needs 19 of them.
        detectors: names of entries of DEFENSES, or mappings with their options; None is what
            `audit.encoder.usual_detectors` says.
        drill, alpha, seed: as in `audit.encoder.scan_encoder`.
        page: an HTML page to write.
        sarif: a SARIF file to write.
        foreign: with `arch`: key_prefix, mean and std; see `models.foreign.import_encoder`.
        options: as in `run`; the store keeps every inspection, so that a clean encoder is looked at once.

    Raises:
        BltoError: as `scan_encoder`, or for images or files that cannot be read or written.
    """
    where = environment(**options)
    images = datasets.load(data, data_root=where.data_root, split="test", progress=where.progress)
    size = {"image_size": images.image_size} if arch is not None else {}
    named = None if detectors is None else [{"name": each} if isinstance(each, str) else each for each in detectors]
    _make_places(page, sarif)
    found = scan_encoder(
        Path(encoder),
        images.without_labels(),
        arch=arch,
        options={**size, **(foreign or {})},
        clean=[Path(os.fspath(each)) for each in clean],
        detectors=named,
        drill=drill,
        alpha=alpha,
        seed=seed,
        store=where.store,
        device=where.device,
        progress=where.progress,
    )
    if page is not None:
        write_text(Path(page), render_page(found, images.images))
    if sarif is not None:
        write_json(Path(sarif), as_sarif(found))
    return found


def scan_data(
    images: str | AnyPath | Mapping[str, Any],
    *,
    clean: str | AnyPath | Mapping[str, Any] | None = None,
    detectors: Sequence[str | Mapping[str, Any]] | None = None,
    drill: float = 0.0,
    alpha: float = 0.05,
    seed: int = 0,
    skip_bad: int = 0,
    image_size: int | None = None,
    executor: str = "serial",
    workers: int | None = None,
    address: str | None = None,
    page: AnyPath | None = None,
    sarif: AnyPath | None = None,
    **options: Unpack[Options],
) -> DataScan:
    """Are these images poisoned, and how sure is that? See docs/scan.md.

    Args:
        images: a folder of images, whatever its folders are called, or of `train*.parquet`; or an entry of DATASETS, of
            which the training part is scanned. One that is marked as poisoned is scanned like any other.
        clean: images of the same kind that are known to be clean, likewise; of an entry of DATASETS the test part.
        detectors: names of entries of DEFENSES, or mappings with their options; None is all that can.
        drill, alpha, seed, skip_bad, image_size: as in `audit.pile.scan.scan_pile`.
        executor, workers, address: as in `runtime.executors.build_executor`; "serial", "processes" or "ray".
        page: an HTML page to write.
        sarif: a SARIF file to write.
        options: as in `run`; the scan uses the CPU. The store keeps the result of every part, so that the same call
            goes on after a stop.

    Raises:
        BltoError: as `scan_pile`, or for images or files that cannot be read or written.
    """
    where = environment(**options)
    executors = partial(build_executor, executor, workers=workers, address=address, known=WITH_RAY)
    executors(score_chunk)  # so that a wrong one shows before anything is read
    suspects = _source(images, "train", where)
    known = None if clean is None else _source(clean, "test", where)
    _make_places(page, sarif)
    found = scan_pile(
        suspects,
        known,
        detectors=USUAL if detectors is None else detectors,
        drill=drill,
        alpha=alpha,
        seed=seed,
        skip_bad=skip_bad,
        image_size=image_size,
        executors=executors,
        store=where.store,
        progress=where.progress,
    )
    if page is not None:
        write_text(Path(page), render_pile_page(found, suspects))
    if sarif is not None:
        write_json(Path(sarif), as_sarif(found))
    return found


def _source(given: str | AnyPath | Mapping[str, Any], split: Split, where: Environment) -> Source:
    """A data set where it is the name of one or a mapping, else a folder."""
    if not isinstance(given, Mapping) and str(given) not in datasets.DATASETS.names():
        path = Path(given)
        if not (path.is_dir() and find_parquet(path, "train")):
            return Folder(path)
        given, split = {"name": "parquet", "path": str(path.absolute())}, "train"
    spec = given if isinstance(given, Mapping) else str(given)
    return Loaded(datasets.load(spec, data_root=where.data_root, split=split, poisoned=True, progress=where.progress))


def _make_places(*files: AnyPath | None) -> None:
    """A place that cannot be written shows before the scan. Raises ResourceExhausted."""
    for each in files:
        if each is not None:
            make_directory(Path(each).parent)


def data_as_plain(found: DataScan) -> dict[str, Any]:
    """A scan of images as plain data for JSON."""
    kept = ("file", "sha256", "suspects", "clean", "count", "clean_count", "notes", "tested", "not_tested", "alpha")
    drills = [{**asdict(drill), "power": drill.power} for drill in found.drills]
    return {
        "verdict": found.judgement.verdict.value,
        **{name: getattr(found, name) for name in kept},
        "p_value": found.judgement.p_value,
        "reasons": found.judgement.reasons,
        "power": found.judgement.power,
        "drills": drills,
        "detectors": [asdict(each) for each in found.found],
        "unreadable": found.unreadable,
        "seconds": found.seconds,
    }


def as_plain(found: EncoderScan) -> dict[str, Any]:
    """A scan as plain data for JSON, without the reconstructed triggers."""
    judgement = asdict(found.judgement)
    outcomes = [{**asdict(outcome), "p_value": outcome.p_value} for outcome in found.outcomes]
    kept = ("file", "sha256", "format", "notes", "images", "tested", "not_tested", "alpha", "seconds")
    return {
        "verdict": found.judgement.verdict.value,
        **{name: getattr(found, name) for name in kept},
        "p_value": judgement["p_value"],
        "reasons": judgement["reasons"],
        "power": judgement["power"],
        "detectors": outcomes,
    }
