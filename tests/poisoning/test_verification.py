"""`verify` names the first thing that is not as recorded, whatever was altered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from blto.errors import InputRefused, Mismatch
from blto.files import sha256_file, write_json
from blto.files.images import decode_image, encode_png
from blto.files.parquet import read_class_names, read_image_parquet, read_parquet_metadata, write_image_parquet
from blto.poisoning import (
    AdditiveTrigger,
    PoisonedDataset,
    verify,
)
from blto.poisoning.manifest import Layout

LAYOUTS: list[Layout] = ["parquet", "png"]
Write = Callable[[Layout], Path]
HOSTILE = ["..", ".", "", "a/b", "../../x", "/etc", "a\0b", "a\\b", "~/../../x", "x" * 300, "a/../../b", "\udc80/../.."]


def _edit_manifest(root: Path, **changes: Any) -> None:
    """Change the manifest and seal it again, as an attacker who knows blto would."""
    content = {**json.loads((root / "poison_manifest.json").read_text()), **changes}
    write_json(root / "poison_manifest.json", content)
    marker = json.loads((root / "POISONED.json").read_text())
    known = {key: content[key] for key in marker.keys() & content.keys()}
    marker.update(known, manifest_sha256=sha256_file(root / "poison_manifest.json"))
    write_json(root / "POISONED.json", marker)


def _rewrite_parquet(
    root: Path, *, images: Any = None, labels: Any = None, names: Any = None, marker: bool = True
) -> None:
    path = root / "train.parquet"
    rows = list(read_image_parquet([path]))
    metadata = {"blto_poisoned": read_parquet_metadata(path)["blto_poisoned"]} if marker else {}
    images = [data for data, _ in rows] if images is None else images([data for data, _ in rows])
    labels = [label for _, label in rows] if labels is None else labels([label for _, label in rows])
    write_image_parquet(path, images, labels, names or read_class_names(path), metadata)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_untouched_set_is_verified(layout: Layout, write: Write, trigger: AdditiveTrigger) -> None:
    report = verify(write(layout))
    assert (report.layout, report.n_images, report.n_poisoned) == (layout, 12, 2)
    assert (report.target_class, report.target_class_name) == (1, "bee")
    assert (report.epsilon, report.epsilon_reached) == (8 / 255, 8 / 255)
    assert report.trigger_sha256 == trigger.identity


def test_a_moved_set_is_verified(write: Write, tmp_path: Path) -> None:
    write("png").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert verify(tmp_path / "link") == verify(tmp_path / "moved")


@pytest.mark.parametrize("index", [0, 5, 11])
def test_one_altered_value_of_one_png_is_named(index: int, write: Write, dataset: PoisonedDataset) -> None:
    root = write("png")
    (file,) = root.rglob(f"{index:07d}.png")
    pixels = dataset.poisoned.images[index].transpose(1, 2, 0).copy()
    pixels[7, 7, 2] ^= 1
    file.write_bytes(encode_png(pixels))
    name = file.relative_to(root).as_posix()
    with pytest.raises(Mismatch, match=f"image {index} is not as recorded: the pixels of {name} differ"):
        verify(root)


def test_the_first_of_several_altered_images_is_named(write: Write) -> None:
    root = write("png")
    for index in (9, 4):
        (file,) = root.rglob(f"{index:07d}.png")
        file.write_bytes(encode_png(np.zeros((8, 8, 3), dtype=np.uint8)))
    with pytest.raises(Mismatch, match="image 4 "):
        verify(root)


def test_two_swapped_images_are_noticed(write: Write) -> None:
    root = write("png")
    one, other = root / "train/ant/0000003.png", root / "train/ant/0000006.png"
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
    with pytest.raises(Mismatch, match="image 3 "):
        verify(root)


def test_a_damaged_png_is_named(write: Write) -> None:
    root = write("png")
    file = root / "train/bee/0000001.png"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(Mismatch, match=r"image 1 is not as recorded: train/bee/0000001\.png"):
        verify(root)


def test_a_missing_file_is_named(write: Write) -> None:
    root = write("png")
    (root / "train/cow/0000002.png").unlink()
    (root / "train/cow/0000005.png").unlink()
    with pytest.raises(Mismatch, match=r"train/cow/0000002\.png is missing \(2 in all\)"):
        verify(root)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extra", ["train/ant/new.png", "notes.txt", "train/new_class/"])
def test_an_extra_entry_is_named(extra: str, layout: Layout, write: Write) -> None:
    root = write(layout)
    (root / extra).parent.mkdir(parents=True, exist_ok=True)
    if extra.endswith("/"):
        (root / extra).mkdir()
    else:
        (root / extra).write_bytes(b"")
    with pytest.raises(Mismatch, match="is not in the manifest"):
        verify(root)


def test_links_are_not_followed(write: Write, tmp_path: Path) -> None:
    root = write("png")
    file = root / "train/ant/0000000.png"
    file.rename(tmp_path / "elsewhere.png")
    file.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(Mismatch, match="image 0 "):
        verify(root)


def test_a_class_folder_that_is_a_link_is_refused(write: Write, tmp_path: Path) -> None:
    root = write("png")
    (root / "train/ant").rename(tmp_path / "ant")
    (root / "train/ant").symlink_to(tmp_path / "ant")
    with pytest.raises(InputRefused, match="outside"):
        verify(root)


def test_one_altered_value_in_a_parquet_is_named(write: Write, dataset: PoisonedDataset) -> None:
    root = write("parquet")
    pixels = dataset.poisoned.images[5].transpose(1, 2, 0).copy()
    pixels[0, 0, 0] ^= 1
    _rewrite_parquet(root, images=lambda images: [*images[:5], encode_png(pixels), *images[6:]])
    with pytest.raises(Mismatch, match=r"image 5 is not as recorded: the pixels of train\.parquet, row 5 differ"):
        verify(root)


def test_an_altered_label_is_named(write: Write) -> None:
    root = write("parquet")
    _rewrite_parquet(root, labels=lambda labels: [*labels[:4], 2, *labels[5:]])
    with pytest.raises(Mismatch, match=r"image 4 .*label of train\.parquet, row 4 is 2, recorded is 1"):
        verify(root)


def test_a_missing_row_is_named(write: Write) -> None:
    root = write("parquet")
    _rewrite_parquet(root, images=lambda images: images[:11], labels=lambda labels: labels[:11])
    with pytest.raises(Mismatch, match=r"image 11 .*the file ends before it"):
        verify(root)


def test_a_row_too_many_is_named(write: Write) -> None:
    root = write("parquet")
    _rewrite_parquet(root, images=lambda images: [*images, images[0]], labels=lambda labels: [*labels, 0])
    with pytest.raises(Mismatch, match="row 12 is beyond the recorded 12"):
        verify(root)


@pytest.mark.parametrize("change", [{"marker": False}, {"names": ("ant", "bee", "dog")}])
def test_altered_parquet_metadata_is_noticed(change: dict[str, Any], write: Write) -> None:
    root = write("parquet")
    _rewrite_parquet(root, **change)
    with pytest.raises(Mismatch, match="class names or its poison marker"):
        verify(root)


def test_other_bytes_with_the_same_images_are_noticed(write: Write) -> None:
    root = write("parquet")
    file = root / "train.parquet"
    reencoded = [decode_image(data, "x") for data, _ in read_image_parquet([file])]
    _rewrite_parquet(root, images=lambda _: [_with_text_chunk(encode_png(pixels)) for pixels in reencoded])
    with pytest.raises(Mismatch, match="its bytes differ, though every image"):
        verify(root)


def _with_text_chunk(png: bytes) -> bytes:
    body = b"tEXtnote\0x"
    chunk = (len(body) - 4).to_bytes(4, "big") + body + crc32(body).to_bytes(4, "big")
    return png[:33] + chunk + png[33:]


def test_a_destroyed_parquet_is_named(write: Write) -> None:
    root = write("parquet")
    (root / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(Mismatch, match=r"image 0 is not as recorded: .*train\.parquet"):
        verify(root)


@pytest.mark.parametrize("file", ["poison_manifest.json", "POISONED.json"])
def test_flipped_bits_in_the_records_are_noticed(file: str, write: Write) -> None:
    root = write("png")
    data = (root / file).read_bytes()
    for position in range(0, 8 * len(data), 37):
        byte = data[position // 8] ^ 1 << position % 8
        (root / file).write_bytes(data[: position // 8] + bytes([byte]) + data[position // 8 + 1 :])
        with pytest.raises((Mismatch, InputRefused)) as refusal:
            verify(root)
        assert len(str(refusal.value)) < 400
    (root / file).write_bytes(data)
    verify(root)


def test_a_missing_marker_is_noticed(write: Write) -> None:
    root = write("png")
    (root / "POISONED.json").unlink()
    with pytest.raises(Mismatch, match="taken for a clean one"):
        verify(root)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"poison_manifest\.json"):
        verify(tmp_path)
    with pytest.raises(InputRefused):
        verify(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n_images": 11}, "n_images"),
        ({"n_poisoned": 3}, "n_poisoned"),
        ({"poison_rate": 0.5}, "poison_rate"),
        ({"labels": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 9]}, "no class name"),
        ({"labels": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, -1]}, "labels.11"),
        ({"target_class": 3}, "no class name"),
        ({"images": ["0" * 16] * 12}, "hash is not that of its image"),
        ({"images": ["../../etc/passwd"] * 12}, "images.0"),
        ({"poisons": []}, "n_poisoned"),
        ({"layout": "zip"}, "layout"),
        ({"layout": None}, "not written"),
        ({"schema_version": "1"}, "schema_version"),
        ({"surprise\x1b[2J": 1}, r"surprise\\x1b"),
        ({"epsilon": True}, "epsilon"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, Any], problem: str, write: Write) -> None:
    root = write("png")
    _edit_manifest(root, **changes)
    with pytest.raises(InputRefused, match=problem) as refusal:
        verify(root)
    assert "\x1b" not in str(refusal.value)


def test_a_newer_manifest_asks_for_a_newer_blto(write: Write) -> None:
    root = write("png")
    _edit_manifest(root, schema_version=2)
    with pytest.raises(Mismatch, match="upgrade blto"):
        verify(root)


def test_short_hashes_alone_do_not_pass(write: Write) -> None:
    root = write("png")
    _edit_manifest(root, pixels_sha256="0" * 64)
    with pytest.raises(Mismatch, match="hash over all images"):
        verify(root)


def test_a_poison_is_compared_by_its_whole_hash(write: Write) -> None:
    root = write("png")
    poisons = json.loads((root / "poison_manifest.json").read_text())["poisons"]
    poisons[1]["poisoned_sha256"] = poisons[1]["poisoned_sha256"][:16] + "0" * 48
    _edit_manifest(root, poisons=poisons)
    with pytest.raises(Mismatch, match=f"image {poisons[1]['index']} is not as recorded"):
        verify(root)


@pytest.mark.parametrize("name", HOSTILE)
def test_class_names_that_lead_elsewhere_are_refused(name: str, write: Write, tmp_path: Path) -> None:
    root = write("png")
    _edit_manifest(root, class_names=["ant", "bee", name])
    with pytest.raises(InputRefused) as refusal:
        verify(root)
    assert refusal.value.code == "MANIFEST-REFUSED"
