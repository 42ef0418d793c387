"""Files: the only code that writes them, and the only code that parses foreign ones. Imports no torch.

The readers of one format (`images`, `parquet`, `safetensors`, those in `foreign`) are imported by their own names, so
that a command which only writes JSON does not load them.
"""

from blto.files.atomic import (
    append_jsonl,
    atomic_file,
    atomic_write,
    canonical_json,
    make_directory,
    read_json,
    read_jsonl,
    remove_leftovers,
    sha256_bytes,
    sha256_file,
    staged_directory,
    write_json,
    write_staged,
    write_text,
)
from blto.files.locks import DirectoryLock
from blto.files.paths import safe_join
from blto.files.reading import open_regular, read_bytes
from blto.files.text import show

__all__ = [
    "DirectoryLock",
    "append_jsonl",
    "atomic_file",
    "atomic_write",
    "canonical_json",
    "make_directory",
    "open_regular",
    "read_bytes",
    "read_json",
    "read_jsonl",
    "remove_leftovers",
    "safe_join",
    "sha256_bytes",
    "sha256_file",
    "show",
    "staged_directory",
    "write_json",
    "write_staged",
    "write_text",
]
