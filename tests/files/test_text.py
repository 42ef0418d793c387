"""What is shown of text from outside is one printable line, whatever is in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blto.files.text import show

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
NASTY = st.one_of(
    st.text(), st.binary().map(os.fsdecode), st.text(st.sampled_from("a\x1b\r\n\x9b\u202e\u200b\u2066é猫"))
)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(NASTY, st.integers(4, 60))
@example("\x1b]52;c;ZWNobw==\x07", 60)
@example("\u202e" * 100, 20)
def test_shown_text_is_one_printable_line(text: str, limit: int) -> None:
    shown = show(text, limit)
    assert not UNSAFE.search(shown)
    assert len(shown) <= limit
    assert len(shown.splitlines()) <= 1
    shown.encode()  # no lone surrogate is left
    assert show(shown, limit) == shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat.png", "cat.png"),
        ("Käse 猫", "Käse 猫"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb", "a\\x0ab"),
        ("a\u202eb", "a\\u202eb"),
        ("a\U000e0041b", "a\\U000e0041b"),
        ("a\u3164b", "a\\u3164b"),
        (b"a\xff", "a\\udcff"),
        (Path("x/\x7f"), "x/\\x7f"),
        (17, "17"),
    ],
)
def test_known_texts(text: object, expected: str) -> None:
    assert show(text) == expected


def test_a_long_text_keeps_its_start_and_its_end() -> None:
    shown = show("/start/" + "x" * 10_000_000 + "/end.png", 60)
    assert shown.startswith("/start/xxx")
    assert "..." in shown
    assert shown.endswith("/end.png")
    assert len(shown) == 60
