from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from blto.data.cache import FACTS, IMAGES, LABELS, cache_folder, cached, files_key, map_array
from blto.data.images import ImageSet
from blto.data.views import RECIPES, Views
from blto.errors import ConfigError, InputRefused
from blto.files import show, staged_directory
from tests.factories import random_images


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLTO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Source:
    """A decoder that counts how often it is asked."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.decoded = 0

    def __call__(self) -> ImageSet:
        self.decoded += 1
        return self.images


def same(first: ImageSet, second: ImageSet) -> bool:
    return (
        first.content_hash == second.content_hash
        and first.class_names == second.class_names
        and first.name == second.name
    )


def test_decodes_once_and_returns_the_same_set(cache: Path) -> None:
    source = Source(random_images())
    sets = [cached(lambda: "a" * 64, source) for _ in range(3)]
    assert source.decoded == 1
    assert all(same(each, source.images) for each in sets)
    assert {path.name for path in (cache / "images" / ("a" * 64)).iterdir()} == {IMAGES, LABELS, FACTS}


def test_images_are_mapped_and_writing_to_them_leaves_the_file_alone() -> None:
    source = Source(random_images())
    first = cached(lambda: "k", source)
    assert isinstance(first.images.base, np.memmap)
    assert first.images.flags.writeable  # torch warns about arrays that are not
    first.images[:] = 0
    assert same(cached(lambda: "k", source), source.images)
    assert source.decoded == 1


def test_a_file_larger_than_memory_is_mapped_all_the_same(tmp_path: Path) -> None:
    """Ten times the machine's memory and without a byte on the disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shape = (10 * memory // (3 * 32 * 32), 3, 32, 32)
    path = tmp_path / "sparse.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    images = ImageSet(map_array(path), None, (), "large")
    assert len(images) == shape[0]
    rows = np.array([0, len(images) - 1])
    views = Views(RECIPES["simclr"], 32)
    assert views.fast(images.images, rows, views.draw(seed=0, epoch=0, samples=rows, view=0)).shape == (2, 3, 32, 32)
    with pytest.raises(FileNotFoundError):
        map_array(tmp_path / "absent.npy")


def test_sets_without_labels() -> None:
    source = Source(random_images().without_labels())
    cached(lambda: "k", source)
    again = cached(lambda: "k", source)
    assert again.labels is None
    assert same(again, source.images)


def test_another_key_is_another_entry() -> None:
    first, second = Source(random_images(seed=0)), Source(random_images(seed=1))
    assert same(cached(lambda: "k", first), first.images)
    assert same(cached(lambda: "l", second), second.images)


def test_a_key_sees_bytes_order_and_settings_but_not_names(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, text in zip(paths, ("one", "two", "one"), strict=True):
        path.write_text(text)
    a, b, c = paths
    assert files_key([a], size=3) == files_key([c], size=3)
    keys = [
        files_key([a], size=3),
        files_key([a], size=4),
        files_key([b], size=3),
        files_key([a, b], size=3),
        files_key([b, a], size=3),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["flip", "cut", "no labels", "facts"])
def test_a_damaged_entry_is_not_used(cache: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    source = Source(random_images())
    cached(lambda: "k", source)
    entry = cache / "images" / "k"
    data = bytearray((entry / IMAGES).read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        (entry / IMAGES).write_bytes(data)
    elif damage == "cut":
        (entry / IMAGES).write_bytes(data[:-1])
    elif damage == "no labels":
        (entry / LABELS).unlink()
    else:
        (entry / FACTS).write_text("[]")
    assert same(cached(lambda: "k", source), source.images)
    assert source.decoded == 2
    warning = capsys.readouterr().err
    assert warning.startswith("blto: warning: ")
    assert "damaged" in warning
    assert warning.count("\n") == 1


@pytest.mark.parametrize("number", [None, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_costs_one_line_for_all_sets(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "file" / "cache"
    if number is None:
        (tmp_path / "file").write_text("in the way")
    else:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "makedirs", refuse)
    monkeypatch.setenv("BLTO_CACHE", str(folder))
    for seed in (0, 1):
        source = Source(random_images(seed=seed))
        for decoded in (1, 2):
            assert same(cached(lambda seed=seed: f"k{seed}", source), source.images)  # type: ignore[misc]
            assert source.decoded == decoded
    warning = capsys.readouterr().err
    reason = os.strerror(number or errno.EEXIST)
    assert warning.startswith(f"blto: warning: decoded images are not kept in {show(folder)} ({reason}) ")
    assert "set BLTO_CACHE" in warning
    assert warning.count("\n") == 1


def test_a_cache_that_may_not_be_searched_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    source = Source(random_images())
    monkeypatch.setattr(Path, "stat", refuse)
    assert same(cached(lambda: "k", source), source.images)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_source_that_changes_while_it_is_read_is_refused(cache: Path) -> None:
    keys = iter(("before", "after"))
    with pytest.raises(InputRefused, match="changed while"):
        cached(lambda: next(keys), Source(random_images()))
    assert not cache.exists()


def test_two_processes_may_write_the_same_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(random_images())

    def late() -> ImageSet:
        cached(lambda: "k", source)  # the other one is done first
        return source()

    assert same(cached(lambda: "k", late), source.images)
    assert source.decoded == 2
    with pytest.raises(ConfigError), staged_directory(cache_folder() / "images" / "k"):
        pass


def test_the_folder_is_the_variable_or_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("BLTO_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "blto"


def test_a_set_comes_from_the_cache_without_being_decoded_or_copied(cache: Path) -> None:
    pixels = np.zeros((5_000, 3, 32, 32), np.uint8)
    source = Source(ImageSet(pixels, np.zeros(5_000, np.int64), ("zero",), "large"))
    cached(lambda: "k", source)
    tracemalloc.start()
    again = cached(lambda: "k", source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.decoded == 1
    assert isinstance(again.images.base, np.memmap)
    assert Path(again.images.base.filename or "") == cache / "images" / "k" / IMAGES
    assert peak < pixels.nbytes / 3
