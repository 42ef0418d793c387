"""Images in parquet, in the layout of Hugging Face data sets: a struct {bytes, path} and an integer label."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blto.errors import BltoError, InputRefused
from blto.files.atomic import atomic_file
from blto.files.reading import open_regular, parse_json
from blto.files.text import show

CODE = "PARQUET-REFUSED"
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")
_MAX_ROWS = 50_000_000  # a column that repeats one value can claim any number of rows in a few bytes
_BATCH = 64
_ROW_GROUP = 2048


def read_image_parquet(paths: Sequence[Path]) -> Iterator[tuple[bytes, int | None]]:
    """Encoded image and label (None where there is no label column) of every row, in file order.

    The `path` inside a row is never opened, nor even read.

    Raises:
        InputRefused: PARQUET-REFUSED naming the file (and the row): damaged, other columns, or a null.
    """
    for path in paths:
        with _opened(path) as file:
            image, label = _columns(file.schema_arrow, path)
            wanted = [f"{image}.bytes", *([label] if label else [])]
            row = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted, use_threads=False):
                images = batch.column(image).field("bytes").to_pylist()
                labels = batch.column(label).to_pylist() if label else [None] * len(images)
                for data, number in zip(images, labels, strict=True):
                    if data is None:
                        raise _refusal(path, f"row {row} holds no image bytes")
                    if label and number is None:
                        raise _refusal(path, f"row {row} has no label")
                    yield data, number
                    row += 1
            if row != file.metadata.num_rows:
                raise _refusal(path, f"holds {row} rows and claims {file.metadata.num_rows}")


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names from the `huggingface` schema metadata; empty where there are none. Raises InputRefused."""
    text = read_parquet_metadata(path).get("huggingface")
    if text is None:
        return ()
    value = parse_json(text.encode(), f"{show(path)}: huggingface metadata", code=CODE)
    for key in ("info", "features"):
        value = value.get(key) if isinstance(value, dict) else None
    features = value if isinstance(value, dict) else {}
    label = next((features[column] for column in _LABEL_COLUMNS if column in features), None)
    names = label.get("names", []) if isinstance(label, dict) else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refusal(path, "its class names are not a list of texts")
    return tuple(names)


def read_parquet_metadata(path: Path) -> dict[str, str]:
    """The schema's metadata as text, without reading any row. Raises InputRefused."""
    with _opened(path) as file:
        entries = dict(file.schema_arrow.metadata or {})
        return {key.decode(): value.decode() for key, value in entries.items() if key != b"ARROW:schema"}


def write_image_parquet(
    path: Path,
    images: Iterable[bytes],
    labels: Iterable[int] | None,
    class_names: Sequence[str],
    extra_metadata: Mapping[str, str],
) -> None:
    """Write encoded images (PNG) and labels in the layout that `read_image_parquet` reads.

    Raises:
        ResourceExhausted: as `atomic_write`; `path` holds what it held before.
        ValueError: unequal numbers of images and labels.
    """
    features: dict[str, Any] = {"img": {"_type": "Image"}}
    fields = [("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    if labels is not None:
        features["label"] = {"_type": "ClassLabel", "names": list(class_names)}
        fields.append(("label", pa.int64()))
    metadata = {**extra_metadata, "huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(fields, metadata=metadata)
    rows = ((image, None) for image in images) if labels is None else zip(images, labels, strict=True)
    with (
        atomic_file(path) as file,
        # PNG does not compress further; a checksum per page lets a reader find damage.
        pq.ParquetWriter(file, schema, compression="none", write_page_checksum=True) as writer,
    ):
        while group := list(islice(rows, _ROW_GROUP)):
            records = [{"img": {"bytes": image, "path": None}, "label": label} for image, label in group]
            writer.write_table(pa.Table.from_pylist(records, schema=schema))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as `pq.ParquetFile`; whatever pyarrow raises while it is used becomes one InputRefused."""
    with open_regular(path, code=CODE) as handle:
        try:
            file = pq.ParquetFile(handle, page_checksum_verification=True)
            if file.metadata.num_rows > _MAX_ROWS:
                raise _refusal(path, f"claims {file.metadata.num_rows} rows; the limit is {_MAX_ROWS}")
            yield file
        except BltoError:
            raise
        except Exception as error:  # pyarrow meets damage with several kinds, running out of memory among them
            raise _refusal(path, show(error, 100)) from error


def _columns(schema: Any, path: Path) -> tuple[str, str | None]:
    """Names of the image column and, if there is one, the label column, after checking their types."""
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        found = show(", ".join(schema.names), 80)
        raise _refusal(path, f'has the columns {found}; an "img" or "image" column is needed')
    kind = schema.field(image).type
    child = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None
    if child is None or not (pa.types.is_binary(child) or pa.types.is_large_binary(child)):
        raise _refusal(path, f'its column "{image}" is {show(kind, 60)}; a struct with binary "bytes" is needed')
    label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    if label is not None and not pa.types.is_signed_integer(schema.field(label).type):
        raise _refusal(
            path, f'its column "{label}" is {show(schema.field(label).type, 60)}; signed integers are needed'
        )
    return image, label


def _refusal(path: Path, reason: str) -> InputRefused:
    return InputRefused(f"{show(path)}: {reason}. Give an intact parquet file of images.", code=CODE)
