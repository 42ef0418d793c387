"""Fetching a public data set: https only, checked against a known sum, complete or not at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blto.errors import ConfigError, InputRefused
from blto.files.atomic import atomic_file
from blto.files.text import show

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30.0

Progress = Callable[[int, int | None], None]


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    progress: Progress | None = None,
    max_bytes: int = 4 << 30,
) -> None:
    """Fetch `url` to `path`; nothing appears at `path` unless the sum is right.

    Args:
        url: an https address.
        path: where the file goes.
        sha256: expected sum, as hex; or
        md5: the sum that the authors published, where they published only that.
        progress: called with (bytes so far, bytes in all or None) after every piece.
        max_bytes: where to stop.

    Raises:
        ConfigError: NO-DATA: the address cannot be reached; says what was looked for and where to put it by hand.
        InputRefused: DOWNLOAD-REFUSED: not the expected file.
        ResourceExhausted: as `atomic_write`.
    """
    expected = sha256 or md5
    if not url.startswith("https://") or not expected:
        raise ValueError("a download needs an https address and a checksum")
    digest = hashlib.sha256() if sha256 else hashlib.md5(usedforsecurity=False)
    with _reaching(url, path):
        response = urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS)
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    done = 0
    with response, atomic_file(path) as file:
        while piece := _read(response, url, path):
            done += len(piece)
            if done > max_bytes:
                raise _refusal(url, f"longer than {max_bytes} bytes")
            digest.update(piece)
            file.write(piece)
            if progress is not None:
                progress(done, total)
        if digest.hexdigest() != expected.lower():
            raise _refusal(url, f"its {digest.name} is {digest.hexdigest()}, not {expected}")


def _read(response: Any, url: str, path: Path) -> bytes:
    with _reaching(url, path):
        return bytes(response.read(_CHUNK))


@contextmanager
def _reaching(url: str, path: Path) -> Iterator[None]:
    """Turn trouble with the network into one line. Writing goes on outside, so a full disk is not called that."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = show(getattr(error, "reason", None) or error, 80)
        advice = f"Put the file at {show(path)} by hand, or try again with a network"
        raise ConfigError(f"{show(url)}: cannot be downloaded ({reason}). {advice}.", code="NO-DATA") from error


def _refusal(url: str, reason: str) -> InputRefused:
    return InputRefused(f"{show(url)}: {reason}. Nothing was kept; try again.", code="DOWNLOAD-REFUSED")
