"""Joining a name from a manifest to a folder without ever leaving it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from blto.errors import InputRefused
from blto.files.text import show

# A leading "~" and a backslash or drive letter mean nothing here, but would to a shell or on another system.
_FOREIGN = re.compile(r"\\|\0|^~|^[A-Za-z]:")
_MAX_COMPONENT_BYTES = 255
_MAX_BYTES = 4000


def safe_join(root: Path, relative: str) -> Path:
    """The real path of `relative` under `root`, with links resolved; the file need not exist.

    Raises:
        InputRefused: MANIFEST-REFUSED when it is empty, absolute, holds `..`, or a link leads out of `root`.
    """
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    encoded = [part.encode(errors="surrogatepass") for part in parts]
    if (
        not parts
        or ".." in parts
        or relative.startswith("/")
        or _FOREIGN.search(relative)
        or max(map(len, encoded)) > _MAX_COMPONENT_BYTES
        or sum(map(len, encoded)) + len(encoded) > _MAX_BYTES
    ):
        raise _refusal(root, relative)
    base = os.path.realpath(root)
    try:
        real = os.path.realpath(os.path.join(base, *parts))
    except (OSError, ValueError) as error:  # a lone surrogate cannot be a file name
        raise _refusal(root, relative) from error
    if os.path.commonpath([base, real]) != base or real == base:
        raise _refusal(root, relative)
    return Path(real)


def _refusal(root: Path, relative: str) -> InputRefused:
    advice = "Entries must be relative paths that stay inside"
    return InputRefused(
        f'{show(root)}: entry "{show(relative, 80)}" points outside the folder. {advice}.', code="MANIFEST-REFUSED"
    )
