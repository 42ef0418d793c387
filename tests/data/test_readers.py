from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import blto.data
from blto.data import DATASETS, cifar, load
from blto.data.cifar import stratified
from blto.data.decoding import decode_square
from blto.data.images import ImageSet, Split
from blto.data.marker import MARKER_FILE, MARKER_KEY
from blto.errors import BltoError, ConfigError, InputRefused, Mismatch
from blto.files.images import encode_png
from blto.files.parquet import write_image_parquet

REAL = Path(os.environ.get("BLTO_DATA", "/nowhere"))
Pixels = npt.NDArray[np.uint8]
TEN = tuple("abcdefghij")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, no data root from outside, and no network."""

    def unreachable(url: str, path: Path, **_: Any) -> None:
        advice = f"Put the file at {path} by hand."
        raise ConfigError(f"{url}: cannot be downloaded. {advice}", code="NO-DATA") from OSError("no network")

    monkeypatch.setenv("BLTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BLTO_DATA", raising=False)
    monkeypatch.setattr(cifar, "download", unreachable)


def noise(count: int, size: int = 32, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def channels_first(pixels: Pixels) -> Pixels:
    return pixels.transpose(0, 3, 1, 2)


def put_parquet(
    path: Path, pixels: Pixels, names: Sequence[str] = TEN, *, labels: bool = True, mark: bool = False
) -> None:
    numbers = [index % max(len(names), 1) for index in range(len(pixels))]
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = {MARKER_KEY: "0" * 64} if mark else {}
    write_image_parquet(path, map(encode_png, pixels), numbers if labels else None, names, marks)


def put_batches(folder: Path, train: Pixels, test: Pixels) -> None:
    """The Python batches of CIFAR-10, five for training."""

    def rows(pixels: Pixels) -> Pixels:
        return channels_first(pixels).reshape(len(pixels), -1)

    folder.mkdir(parents=True)
    batches = {f"data_batch_{i + 1}": part for i, part in enumerate(np.array_split(train, 5))} | {"test_batch": test}
    for name, part in batches.items():
        content = {b"data": rows(part), b"labels": [index % 10 for index in range(len(part))]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(TEN)}, protocol=2))


def put_image(path: Path, pixels: Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(pixels))
    return path


def put_folder(root: Path, classes: Sequence[str], each: int, size: int = 16) -> None:
    for label, name in enumerate(classes):
        for index, pixels in enumerate(noise(each, size, seed=label)):
            put_image(root / name / f"{index:02d}.png", pixels)


class TestCifar:
    @pytest.mark.parametrize("form", ["parquet", "parquet here", "batches", "the batches' folder", "archive"])
    def test_every_form_gives_the_same_images(self, tmp_path: Path, form: str) -> None:
        train, test = noise(20, seed=1), noise(10, seed=2)
        root = tmp_path / "data"
        if form.startswith("parquet"):
            folder = root / "cifar10" if form == "parquet" else root
            put_parquet(folder / "train-00000-of-00002.parquet", train[:10])
            put_parquet(folder / "train-00001-of-00002.parquet", train[10:])
            put_parquet(folder / "test-00000-of-00001.parquet", test)
        else:
            put_batches(root / "cifar-10-batches-py", train, test)
        if form == "archive":
            with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
                archive.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
            (root / "cifar-10-batches-py").rename(tmp_path / "away")
        if form == "the batches' folder":
            root = root / "cifar-10-batches-py"
        for split, pixels in (("train", train), ("test", test)):
            for _ in range(2):  # decoded, then from the cache
                images = load("cifar10", data_root=root, split=split)  # type: ignore[arg-type]
                np.testing.assert_array_equal(images.images, channels_first(pixels))
                assert images.class_names == TEN
                assert images.name == "cifar10"
                assert images.labels is not None
                assert len(images.labels) == len(pixels)

    def test_the_variable_names_the_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        put_parquet(tmp_path / "cifar10" / "train.parquet", noise(10))
        monkeypatch.setenv("BLTO_DATA", str(tmp_path))
        assert len(load("cifar10")) == 10

    @pytest.mark.parametrize("root", [None, "somewhere"])
    def test_nothing_found_is_one_line_that_says_where_it_looked(
        self, tmp_path: Path, root: str | None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            load("cifar10", data_root=None if root is None else tmp_path / root)
        message = str(caught.value)
        assert (caught.value.code, caught.value.exit_code) == ("NO-DATA", 2)
        for part in ("cifar10/train*.parquet", "cifar-10-python.tar.gz", "--data-root", "BLTO_DATA", "no network"):
            assert part in message
        assert "\n" not in message
        if root is not None:
            assert f"{root}, and no download" in message
        assert "downloading https://www.cs.toronto.edu" in capsys.readouterr().err

    def test_downloads_where_it_can(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train, test = noise(10, seed=1), noise(10, seed=2)
        asked = []

        def fake(url: str, path: Path, *, sha256: str, progress: Any, max_bytes: int) -> None:
            asked.append((url, sha256, max_bytes))
            progress(max_bytes, None)
            put_batches(tmp_path / "made", train, test)
            path.parent.mkdir(parents=True)
            with tarfile.open(path, "w:gz") as archive:
                archive.add(tmp_path / "made", "cifar-10-batches-py")

        monkeypatch.setattr(cifar, "download", fake)
        np.testing.assert_array_equal(load("cifar10").images, channels_first(train))
        np.testing.assert_array_equal(load("cifar10", split="test").images, channels_first(test))
        sha256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
        assert asked == [("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", sha256, 170_498_071)]

    def test_another_set_under_its_name_is_refused(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "train.parquet", noise(10), names=("cat", "dog"))
        with pytest.raises(InputRefused, match='"parquet"'):
            load("cifar10", data_root=tmp_path)
        put_parquet(tmp_path / "cifar10" / "train.parquet", noise(10, size=16))
        with pytest.raises(InputRefused, match="16 pixels"):
            load("cifar10", data_root=tmp_path)

    def test_limits_keep_proportions_and_follow_the_seed(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "train.parquet", noise(60))
        put_parquet(tmp_path / "test.parquet", noise(20, seed=1))
        whole = load("cifar10", data_root=tmp_path)

        def part(split: Split = "train", **limits: int) -> ImageSet:
            return load({"name": "cifar10", **limits}, data_root=tmp_path, split=split)

        first = part(train_limit=30, test_limit=10)
        assert np.bincount(first.labels).tolist() == [3] * 10  # type: ignore[arg-type]
        assert first.content_hash == part(train_limit=30).content_hash
        assert first.content_hash != part(train_limit=30, limit_seed=1).content_hash
        assert {image.tobytes() for image in first.images} <= {image.tobytes() for image in whole.images}
        assert len(part("test", train_limit=30, test_limit=10)) == 10
        with pytest.raises(ConfigError, match="61 images exceeds the 60"):
            part(train_limit=61)

    @pytest.mark.parametrize("limit", [1, 7, 50, 99, 100])
    def test_stratified_is_within_one_of_the_proportions(self, limit: int) -> None:
        labels = np.repeat(np.arange(3), [50, 30, 20]).astype(np.int64)
        chosen = stratified(labels, limit, seed=0)
        assert len(np.unique(chosen)) == limit
        assert (np.diff(chosen) > 0).all()
        counts = np.bincount(labels[chosen], minlength=3)
        assert (np.abs(counts - limit * np.array([0.5, 0.3, 0.2])) < 1).all()

    @pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="BLTO_DATA does not hold CIFAR-10")
    def test_the_real_test_set(self) -> None:
        images = load("cifar10", data_root=REAL, split="test")
        assert images.images.shape == (10_000, 3, 32, 32)
        assert np.bincount(images.labels).tolist() == [1000] * 10  # type: ignore[arg-type]
        assert images.class_names[:2] == ("airplane", "automobile")
        mean = images.images.mean((0, 2, 3)) / 255
        np.testing.assert_allclose(mean, [0.4942, 0.4851, 0.4504], atol=2e-4)  # the widely used constants


class TestParquet:
    def test_reads_a_folder_a_data_folder_and_one_file(self, tmp_path: Path) -> None:
        pixels = noise(4, size=12)
        put_parquet(tmp_path / "one" / "train.parquet", pixels, names=("cat", "dog"))
        put_parquet(tmp_path / "two" / "data" / "train.parquet", pixels, names=("cat", "dog"))
        for path in ("one", "two", "one/train.parquet", str(tmp_path / "one")):
            images = load({"name": "parquet", "path": path}, data_root=tmp_path)
            np.testing.assert_array_equal(images.images, channels_first(pixels))
            assert images.class_names == ("cat", "dog")

    def test_labels_and_names_may_be_absent(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "train.parquet", noise(3), labels=False)
        put_parquet(tmp_path / "test.parquet", noise(3), names=())
        assert load("parquet", data_root=tmp_path).labels is None
        assert load("parquet", data_root=str(tmp_path), split="test").class_names == ("0",)

    def test_parts_must_agree_on_labels(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "train-0.parquet", noise(3))
        put_parquet(tmp_path / "train-1.parquet", noise(3), labels=False)
        with pytest.raises(InputRefused, match="all or none"):
            load("parquet", data_root=tmp_path)

    def test_sizes_must_agree_unless_one_is_asked_for(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "train-0.parquet", noise(2, size=12))
        put_parquet(tmp_path / "train-1.parquet", noise(2, size=20))
        with pytest.raises(InputRefused, match="image_size"):
            load("parquet", data_root=tmp_path)
        assert load({"name": "parquet", "image_size": 10}, data_root=tmp_path).image_size == 10

    def test_a_bad_row_is_named(self, tmp_path: Path) -> None:
        encoded = [encode_png(image) for image in noise(3)]
        encoded[2] = encoded[2][:-20]
        write_image_parquet(tmp_path / "train.parquet", encoded, [0, 0, 0], ["cat"], {})
        with pytest.raises(InputRefused, match=r"train\.parquet: row 2"):
            load("parquet", data_root=tmp_path)

    def test_an_empty_set_is_refused(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "train.parquet", noise(0))
        with pytest.raises(InputRefused, match="no image"):
            load("parquet", data_root=tmp_path)

    def test_a_missing_split_says_what_is_missing(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "train.parquet", noise(2))
        with pytest.raises(ConfigError, match=r"test\*\.parquet") as caught:
            load("parquet", data_root=tmp_path, split="test")
        assert caught.value.code == "NO-DATA"

    def test_a_changed_file_is_read_anew(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "train.parquet", noise(2, seed=0))
        first = load("parquet", data_root=tmp_path)
        put_parquet(tmp_path / "train.parquet", noise(2, seed=1))
        assert load("parquet", data_root=tmp_path).content_hash != first.content_hash


class TestImageFolder:
    def test_split_folders(self, tmp_path: Path) -> None:
        put_folder(tmp_path / "train", ("dog", "cat"), 3)
        put_folder(tmp_path / "test", ("dog", "cat"), 2)
        spec = {"name": "image_folder", "image_size": 16}
        train, test = (load(spec, data_root=tmp_path, split=split) for split in ("train", "test"))
        assert train.class_names == test.class_names == ("cat", "dog")
        assert train.labels is not None
        assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        expected = np.concatenate([noise(3, 16, seed=1), noise(3, 16, seed=0)])
        np.testing.assert_array_equal(train.images, channels_first(expected))
        assert len(test) == 4

    def test_nested_folders_and_dot_files(self, tmp_path: Path) -> None:
        put_folder(tmp_path / "train", ("cat",), 1)
        put_image(tmp_path / "train" / "cat" / "more" / "x.png", noise(1, 16)[0])
        (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"junk")
        (tmp_path / "train" / ".cache").mkdir()
        images = load("image_folder", data_root=tmp_path)
        assert len(images) == 2
        assert images.class_names == ("cat",)

    def test_without_split_folders_a_part_is_held_out(self, tmp_path: Path) -> None:
        put_folder(tmp_path / "pets", ("cat", "dog"), 10)
        put_image(tmp_path / "pets" / "emu" / "only.png", noise(1, 16)[0])

        def part(split: Split, **arguments: Any) -> ImageSet:
            return load({"name": "image_folder", "path": "pets", **arguments}, data_root=tmp_path, split=split)

        train, test = part("train", test_fraction=0.3), part("test", test_fraction=0.3)
        assert np.bincount(train.labels).tolist() == [7, 7, 1]  # type: ignore[arg-type]
        assert np.bincount(test.labels).tolist() == [3, 3]  # type: ignore[arg-type]
        assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
        assert np.bincount(part("train", test_fraction=0.95).labels).tolist() == [1, 1, 1]  # type: ignore[arg-type]
        assert test.content_hash == part("test", test_fraction=0.3).content_hash
        assert test.content_hash != part("test", test_fraction=0.3, split_seed=1).content_hash

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"not an image", "not PNG"), (encode_png(noise(1)[0])[:-30], "truncated"), (b"", "not PNG")],
        ids=["text", "truncated", "empty"],
    )
    def test_a_bad_file_is_named(self, tmp_path: Path, content: bytes, reason: str) -> None:
        put_folder(tmp_path / "train", ("cat",), 2)
        (tmp_path / "train" / "cat" / "bad.png").write_bytes(content)
        with pytest.raises(InputRefused, match=f"bad.png: .*{reason}") as caught:
            load("image_folder", data_root=tmp_path)
        assert caught.value.code == "IMAGE-REFUSED"

    def test_an_image_over_the_limit_is_named(self, tmp_path: Path) -> None:
        put_folder(tmp_path / "train", ("cat",), 1)
        Image.new("1", (8200, 8200)).save(tmp_path / "train" / "cat" / "huge.png")
        with pytest.raises(InputRefused, match=r"huge\.png: 8200x8200 is over the limit"):
            load("image_folder", data_root=tmp_path)

    def test_empty_and_missing_classes_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            load({"name": "image_folder", "path": "none"}, data_root=tmp_path)
        assert caught.value.code == "NO-DATA"
        (tmp_path / "train").mkdir()
        with pytest.raises(InputRefused, match="no class folder"):
            load("image_folder", data_root=tmp_path)
        put_folder(tmp_path / "train", ("cat",), 1)
        (tmp_path / "train" / "dog").mkdir()
        with pytest.raises(InputRefused, match="dog: class folder without an image"):
            load("image_folder", data_root=tmp_path)
        put_folder(tmp_path / "test", ("cat",), 1)
        with pytest.raises(InputRefused, match="class dog"):
            load("image_folder", data_root=tmp_path, split="test")

    def test_links_and_pipes(self, tmp_path: Path) -> None:
        root, outside = tmp_path / "root", tmp_path / "outside"
        put_folder(root / "train", ("cat",), 2)
        put_folder(outside, ("dog",), 1)
        cat = root / "train" / "cat"
        os.symlink(cat / "00.png", cat / "again.png")
        assert len(load("image_folder", data_root=root)) == 3
        refused = [
            (cat / "escape.png", outside / "dog" / "00.png", "a link"),
            (cat / "folder", outside / "dog", "a link"),
            (cat / "loop", root / "train", "a link"),
            (cat / "self.png", cat / "self.png", "cannot be opened"),
            (cat / "device.png", Path("/dev/zero"), "a link"),
            (root / "train" / "dog", outside / "dog", "a link"),
            (root / "train" / "twin", cat, "a link"),
        ]
        for link, target, reason in refused:
            os.symlink(target, link)
            with pytest.raises(InputRefused, match=f"{link.name}: {reason}"):
                load("image_folder", data_root=root)
            link.unlink()
        os.mkfifo(cat / "pipe.png")
        with pytest.raises(InputRefused, match=r"pipe\.png: not a regular file"):
            load("image_folder", data_root=root)
        (cat / "pipe.png").unlink()
        (root / "train").rename(tmp_path / "away")
        os.symlink(tmp_path / "away", root / "train")
        with pytest.raises(InputRefused, match="a link to a folder, or out of"):
            load("image_folder", data_root=root)


class TestDecoding:
    def test_the_middle_square_is_kept_and_resized_with_antialiasing(self) -> None:
        stripes = np.zeros((64, 96, 3), np.uint8)
        stripes[:, ::2] = 255  # the finest stripes: sampling every other column would give plain black or white
        stripes[:, :16] = stripes[:, -16:] = [255, 0, 0]  # what the cut removes
        image = decode_square(encode_png(stripes), "x", 32)
        assert image.shape == (3, 32, 32)
        assert image.flags.c_contiguous
        assert np.abs(image[:, :, 2:-2].astype(int) - 128).max() < 20

    def test_an_image_of_the_right_size_keeps_its_pixels(self) -> None:
        pixels = noise(1)[0]
        for size in (None, 32):
            np.testing.assert_array_equal(decode_square(encode_png(pixels), "x", size), pixels.transpose(2, 0, 1))

    def test_an_oblong_image_needs_a_size(self) -> None:
        with pytest.raises(InputRefused, match=r"x\.png: 6x4 is not square"):
            decode_square(encode_png(np.zeros((4, 6, 3), np.uint8)), "x.png", None)


class TestPoisonedSets:
    @pytest.mark.parametrize("form", ["parquet file", "parquet folder", "image folder", "image split", "cifar10"])
    def test_marked_sets_are_refused_unless_asked_for(self, tmp_path: Path, form: str) -> None:
        spec: dict[str, Any] = {"name": "image_folder"}
        if form.startswith("image"):
            put_folder(tmp_path / "train", ("cat",), 1)
            if form == "image split":
                spec["path"] = "train"  # the folder that holds it carries the mark
        else:
            put_parquet(tmp_path / "train.parquet", noise(10), mark=form != "parquet folder")
            spec = {"name": "cifar10" if form == "cifar10" else "parquet"}
        if form not in ("parquet file", "cifar10"):
            (tmp_path / MARKER_FILE).write_text(json.dumps({}))
        with pytest.raises(Mismatch, match="marked as poisoned") as caught:
            load(spec, data_root=tmp_path)
        assert caught.value.exit_code == 6
        assert len(load(spec, data_root=tmp_path, poisoned=True)) in (1, 10)


class TestRegistry:
    def test_names(self) -> None:
        assert DATASETS.names() == ["cifar10", "cifar100", "image_folder", "parquet", "synthetic"]

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "image_folder", "parquet", "synthetic"])
    def test_cards_and_defaults(self, name: str) -> None:
        card = DATASETS.card(name)
        assert card.title
        assert card.summary.endswith(".")
        assert DATASETS.resolve(name)["name"] == name

    def test_errors(self) -> None:
        with pytest.raises(ConfigError, match="cifar10"):
            load("cifar")
        with pytest.raises(ConfigError, match="train_limit"):
            load({"name": "cifar10", "train_limit": 0})
        with pytest.raises(BltoError, match='"val"'):
            blto.data.load("synthetic", split="val")  # type: ignore[arg-type]

    def test_pixels_reach_torch_without_a_warning(self, tmp_path: Path) -> None:
        import torch

        put_parquet(tmp_path / "train.parquet", noise(4))
        images = load("parquet", data_root=tmp_path)
        assert torch.from_numpy(images.images).shape == (4, 3, 32, 32)


def test_a_png_of_pillow_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    """Against Pillow itself, with a palette image."""
    buffer = io.BytesIO()
    palette = Image.fromarray(noise(1)[0]).quantize(16)
    palette.save(buffer, "PNG")
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_square(buffer.getvalue(), "x", 32), expected)
