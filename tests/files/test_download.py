"""Downloads without a network: what arrives is checked, and nothing else is kept."""

from __future__ import annotations

import hashlib
import http.client
import io
import urllib.error
from pathlib import Path

import pytest

from blto.errors import BltoError, ConfigError, InputRefused
from blto.files.download import download

URL = "https://example.org/cifar.tar.gz"
DATA = bytes(range(256)) * 10_000
SHA256, MD5 = hashlib.sha256(DATA).hexdigest(), hashlib.md5(DATA, usedforsecurity=False).hexdigest()


class Response(io.BytesIO):
    """The shape of urllib's response; may fail after some reads."""

    def __init__(self, data: bytes = DATA, length: str = "", error: Exception | None = None) -> None:
        super().__init__(data)
        self.headers = {"Content-Length": length}
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.error is not None and self.tell() > 0:
            raise self.error
        return super().read(size)


def serve(monkeypatch: pytest.MonkeyPatch, response: Response | Exception) -> None:
    def urlopen(url: str, timeout: float) -> Response:
        assert url == URL
        assert 0 < timeout < 120
        if isinstance(response, Exception):
            raise response
        return response

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


def failure(path: Path) -> BltoError:
    with pytest.raises(BltoError) as error:
        download(URL, path, sha256=SHA256, max_bytes=3_000_000)
    assert list(path.parent.iterdir()) == []
    return error.value


def test_a_checked_file_arrives_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int | None]] = []
    serve(monkeypatch, Response(length=str(len(DATA))))
    download(
        URL, tmp_path / "new" / "a", sha256=SHA256.upper(), progress=lambda done, total: told.append((done, total))
    )
    assert (tmp_path / "new" / "a").read_bytes() == DATA
    assert told[-1] == (len(DATA), len(DATA))
    assert told == sorted(told)
    assert len(told) == 3


def test_md5_is_enough_where_authors_published_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Response())
    download(URL, tmp_path / "a", md5=MD5)
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("data", [b"", DATA[:-1], DATA[:-1] + b"x"])
def test_another_file_is_refused_and_the_old_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    serve(monkeypatch, Response(data))
    with pytest.raises(InputRefused, match=f"its sha256 is .*, not {SHA256}") as error:
        download(URL, tmp_path / "a", sha256=SHA256)
    assert error.value.code == "DOWNLOAD-REFUSED"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    "problem",
    [
        urllib.error.URLError("Name or service not known"),
        urllib.error.HTTPError(URL, 404, "Not Found", http.client.HTTPMessage(), None),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b"x"),
    ],
    ids=["name", "404", "timeout", "incomplete"],
)
def test_trouble_with_the_network_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    for response in (problem, Response(error=problem)):
        serve(monkeypatch, response)
        error = failure(tmp_path / "a")
        assert isinstance(error, ConfigError)
        assert error.code == "NO-DATA"
        assert str(error).startswith(f"{URL}: cannot be downloaded (")
        assert f"Put the file at {tmp_path / 'a'} by hand" in str(error)


def test_an_endless_answer_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Response(DATA * 2))
    assert "longer than 3000000 bytes" in str(failure(tmp_path / "a"))


@pytest.mark.parametrize(
    ("url", "sha256"), [("http://example.org/a", SHA256), ("file:///etc/passwd", SHA256), (URL, None)]
)
def test_other_addresses_and_unchecked_files_are_errors(tmp_path: Path, url: str, sha256: str | None) -> None:
    with pytest.raises(ValueError, match="https"):
        download(url, tmp_path / "a", sha256=sha256)
