"""Poisoned sets on disk: bit-exact, marked, complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blto.data.images import ImageSet
from blto.errors import ConfigError, InputRefused
from blto.files import sha256_file
from blto.files.images import decode_image, encode_png
from blto.files.parquet import read_class_names, read_image_parquet, read_parquet_metadata
from blto.poisoning import (
    AdditiveTrigger,
    Budget,
    IdentityTrigger,
    PoisonedDataset,
    PoisonPlan,
    verify,
    write_poisoned,
)
from blto.poisoning.manifest import Layout

LAYOUTS: list[Layout] = ["parquet", "png"]
Write = Callable[[Layout], Path]
HOSTILE = ["..", ".", "", "a/b", "../../x", "/etc", "a\0b", "a\\b", "~/../../x", "x" * 300, "a/../../b", "\udc80/../.."]


def _tree(root: Path) -> dict[str, str]:
    return {file.relative_to(root).as_posix(): sha256_file(file) for file in root.rglob("*") if file.is_file()}


def test_parquet_comes_back_bit_exactly(write: Write, dataset: PoisonedDataset) -> None:
    root = write("parquet")
    rows = list(read_image_parquet([root / "train.parquet"]))
    images = np.stack([decode_image(data, "row").transpose(2, 0, 1) for data, _ in rows])
    assert np.array_equal(images, dataset.poisoned.images)
    assert dataset.clean.labels is not None
    assert [label for _, label in rows] == dataset.clean.labels.tolist()
    assert read_class_names(root / "train.parquet") == dataset.clean.class_names


def test_png_comes_back_bit_exactly(write: Write, dataset: PoisonedDataset) -> None:
    root = write("png")
    assert dataset.clean.labels is not None
    for index, label in enumerate(dataset.clean.labels):
        file = root / "train" / dataset.clean.class_names[label] / f"{index:07d}.png"
        assert np.array_equal(decode_image(file.read_bytes(), "x").transpose(2, 0, 1), dataset.poisoned.images[index])
    assert len(list(root.rglob("*.png"))) == len(dataset.clean)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_set_is_marked_as_poisoned(layout: Layout, write: Write, trigger: AdditiveTrigger) -> None:
    root = write(layout)
    marker = json.loads((root / "POISONED.json").read_text())
    assert marker["trigger_sha256"] == trigger.identity
    assert "backdoor" in marker["warning"]
    if layout == "parquet":
        assert read_parquet_metadata(root / "train.parquet")["blto_poisoned"] == trigger.identity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_set_gives_the_same_bytes(layout: Layout, write: Write, tmp_path: Path) -> None:
    first = _tree(write(layout))
    shutil.rmtree(tmp_path / "out")
    assert _tree(write(layout)) == first


def test_a_class_without_images_keeps_its_folder(clean: ImageSet, tmp_path: Path) -> None:
    more = replace(clean, class_names=(*clean.class_names, "dog"))
    none = PoisonedDataset(more, PoisonPlan(np.array([], dtype=np.int64), 1, len(more)), more.images[:0])
    write_poisoned(none, IdentityTrigger(), seeds={}, out=tmp_path / "out", layout="png")
    assert (tmp_path / "out/train/dog").is_dir()
    assert verify(tmp_path / "out").n_poisoned == 0


def test_an_occupied_folder_is_refused_and_kept(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write("png")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("inside", ["source", "source/poisoned", "source/a/../b", "link/poisoned", "a/../source"])
def test_output_inside_the_source_is_refused(
    inside: str, dataset: PoisonedDataset, trigger: AdditiveTrigger, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    out = tmp_path / inside
    with pytest.raises(ConfigError, match="inside the source data"):
        write_poisoned(dataset, trigger, seeds={}, out=out, source=tmp_path / "source")
    assert list((tmp_path / "source").iterdir()) == []


def test_a_write_that_fails_leaves_nothing(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_late(pixels: Any) -> bytes:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return encode_png(pixels)

    monkeypatch.setattr("blto.poisoning.export.encode_png", fail_late)
    for layout in LAYOUTS:
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            write(layout)
        assert list(tmp_path.iterdir()) == []


def test_poisons_beyond_the_triggers_budget_are_refused(dataset: PoisonedDataset, tmp_path: Path) -> None:
    weaker = AdditiveTrigger(torch.zeros(3, 8, 8), Budget(7.9 / 255))
    with pytest.raises(ConfigError, match="make the poisons with this trigger"):
        write_poisoned(dataset, weaker, seeds={}, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_layout_is_refused(dataset: PoisonedDataset, trigger: AdditiveTrigger, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='give "parquet" or "png"'):
        write_poisoned(dataset, trigger, seeds={}, out=tmp_path / "out", layout="jpeg")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HOSTILE)
def test_class_names_that_are_no_folder_are_refused(
    name: str, dataset: PoisonedDataset, trigger: AdditiveTrigger, tmp_path: Path
) -> None:
    hostile = replace(dataset, clean=replace(dataset.clean, class_names=("ant", "bee", name)))
    with pytest.raises(InputRefused) as refusal:
        write_poisoned(hostile, trigger, seeds={}, out=tmp_path / "deep/out", layout="png")
    assert refusal.value.code == "MANIFEST-REFUSED"
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]


@pytest.mark.parametrize("names", [("cat", "Cat", "x"), ("caf\u00e9", "cafe\u0301", "x"), ("cat", "cat", "x")])
def test_class_names_that_share_a_folder_are_refused(
    names: tuple[str, ...], dataset: PoisonedDataset, trigger: AdditiveTrigger, tmp_path: Path
) -> None:
    twins = replace(dataset, clean=replace(dataset.clean, class_names=names))
    with pytest.raises(ConfigError, match="would share a folder"):
        write_poisoned(twins, trigger, seeds={}, out=tmp_path / "out", layout="png")
