"""`blto.scan`: the call behind `blto scan encoder`, from paths and names to a result and its files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from blto import data as datasets
from blto.audit.encoder import EncoderScan, scan_encoder
from blto.audit.page import render_page
from blto.audit.sarif import as_sarif
from blto.configuration import AnyPath, Options, environment
from blto.files import make_directory, write_json, write_text


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
    for each in (page, sarif):
        if each is not None:
            make_directory(Path(each).parent)  # a place that cannot be written shows before the scan
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
