"""Images in parquet: the Hugging Face layout, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blto.errors import InputRefused
from blto.files import parquet
from blto.files.parquet import read_class_names, read_image_parquet, read_parquet_metadata, write_image_parquet

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def save(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """A parquet file by way of pyarrow, as others write it."""
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def images(*contents: bytes | None, path: str = "a.png") -> Any:
    return pa.array([{"bytes": content, "path": path} for content in contents], IMAGE)


def features(value: object, column: str = "label") -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": {column: value}}})}


def refusal(path: Path) -> str:
    with pytest.raises(InputRefused) as error:
        list(read_image_parquet([path]))
    assert error.value.code == "PARQUET-REFUSED"
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize(
    ("column", "label", "kind"), [("img", "label", pa.int64()), ("image", "fine_label", pa.int8())]
)
def test_the_hugging_face_layout_is_read(tmp_path: Path, column: str, label: str, kind: Any) -> None:
    metadata = features({"_type": "ClassLabel", "names": ["cat", "dog"]}, label)
    one = save(tmp_path / "1", {column: images(b"a", b"b"), label: pa.array([0, 1], kind)}, metadata)
    two = save(tmp_path / "2", {label: pa.array([1], kind), column: images(b"c"), "more": [1.5]}, metadata)
    assert list(read_image_parquet([one, two])) == [(b"a", 0), (b"b", 1), (b"c", 1)]
    assert read_class_names(one) == ("cat", "dog")


def test_labels_and_names_may_be_absent(tmp_path: Path) -> None:
    path = save(tmp_path / "a", {"img": images(b"a")})
    assert list(read_image_parquet([path])) == [(b"a", None)]
    assert read_class_names(path) == ()
    assert read_parquet_metadata(path) == {}


def test_what_is_written_is_read_back_over_several_row_groups(tmp_path: Path) -> None:
    contents = [bytes([number % 256]) * (number % 7) for number in range(5000)]
    write_image_parquet(tmp_path / "a", iter(contents), (n % 3 for n in range(5000)), ("x", "y", "z"), {"blto": "é"})
    assert list(read_image_parquet([tmp_path / "a"])) == [(data, n % 3) for n, data in enumerate(contents)]
    assert read_class_names(tmp_path / "a") == ("x", "y", "z")
    assert read_parquet_metadata(tmp_path / "a")["blto"] == "é"
    write_image_parquet(tmp_path / "b", contents, [n % 3 for n in range(5000)], ("x", "y", "z"), {"blto": "é"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_images_without_labels_can_be_written(tmp_path: Path) -> None:
    write_image_parquet(tmp_path / "a", [b"a"], None, (), {})
    assert list(read_image_parquet([tmp_path / "a"])) == [(b"a", None)]


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_unequal_numbers_leave_no_file(tmp_path: Path, labels: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_image_parquet(tmp_path / "a", [b"a", b"b"], labels, (), {})
    assert list(tmp_path.iterdir()) == []


def test_rows_come_one_by_one(tmp_path: Path) -> None:
    write_image_parquet(tmp_path / "a", [b"a", b"b"], None, (), {})
    rows: Iterator[Any] = read_image_parquet([tmp_path / "a", tmp_path / "missing"])
    assert [next(rows)[0], next(rows)[0]] == [b"a", b"b"]
    with pytest.raises(InputRefused, match="missing: cannot be opened"):
        next(rows)


def test_the_path_in_a_row_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(b"there")
    rows = images(*[b"x"] * 100, None, path=str(tmp_path / "real.png"))
    assert "row 100 holds no image bytes" in refusal(save(tmp_path / "a", {"img": rows}))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"img": [b"a"]}, 'its column "img" is binary; a struct'),
        ({"image": ["a.png"]}, 'its column "image" is string'),
        ({"img": [{"path": "/etc/passwd"}]}, "a struct with binary"),
        ({"img": [{"bytes": "text"}]}, "a struct with binary"),
        ({"img": [{"bytes": [b"nested"]}]}, "a struct with binary"),
        ({"label": [1], "x\x1b": [2]}, r"has the columns label, x\x1b; an"),
        ({"img": [{"bytes": b"a"}], "label": ["cat"]}, 'its column "label" is string; signed integers'),
        ({"img": [{"bytes": b"a"}], "label": [1.0]}, "signed integers"),
        ({"img": [{"bytes": b"a"}], "label": pa.array([2**64 - 1], pa.uint64())}, "signed integers"),
        ({"img": [{"bytes": b"a"}], "label": pa.array([None], pa.int64())}, "row 0 has no label"),
        ({"img": pa.array([None], pa.struct([("bytes", pa.binary())]))}, "row 0 holds no image bytes"),
    ],
)
def test_other_schemas_and_nulls_are_refused(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    assert reason in refusal(save(tmp_path / "a", columns))


def test_extension_types_are_refused(tmp_path: Path) -> None:
    tensor = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), [2]), pa.array([[1, 2]], pa.list_(pa.int32(), 2))
    )
    assert "struct with binary" in refusal(save(tmp_path / "a", {"img": tensor}))


@pytest.mark.parametrize(
    "metadata",
    [
        {"huggingface": "{"},
        features({"names": "cat"}),
        features({"names": [1, 2]}),
    ],
)
def test_damaged_class_names_are_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = save(tmp_path / "a", {"img": images(b"a"), "label": [0]}, metadata)
    with pytest.raises(InputRefused, match=r"huggingface metadata|class names") as error:
        read_class_names(path)
    assert error.value.code == "PARQUET-REFUSED"


@pytest.mark.parametrize("value", [{}, [], "x", {"info": []}, {"info": {"features": {"label": {"_type": "Value"}}}}])
def test_metadata_without_class_names_is_fine(tmp_path: Path, value: object) -> None:
    path = save(tmp_path / "a", {"img": images(b"a")}, {"huggingface": json.dumps(value)})
    assert read_class_names(path) == ()


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 10, b"x" * 1000])
def test_what_is_no_parquet_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    refusal(tmp_path / "a")


def test_a_claim_of_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_MAX_ROWS", 2)
    assert len(list(read_image_parquet([save(tmp_path / "a", {"img": images(b"a", b"b")})]))) == 2
    assert "claims 3 rows; the limit is 2" in refusal(save(tmp_path / "b", {"img": images(b"a", b"b", b"c")}))


def test_one_damaged_bit_in_a_page_is_found(tmp_path: Path) -> None:
    write_image_parquet(tmp_path / "a", [b"pixels" * 50], [0], ("x",), {})
    data = bytearray((tmp_path / "a").read_bytes())
    data[data.index(b"pixels") + 100] ^= 1
    (tmp_path / "a").write_bytes(data)
    assert "CRC" in refusal(tmp_path / "a")
