"""Whatever a manifest says, the joined path is inside the folder or is refused."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blto.errors import InputRefused
from blto.files.paths import safe_join

PARTS = st.one_of(
    st.sampled_from(
        ["..", ".", "", "~", "a", "b.png", "link_out", "link_up", "link_in", "loop", "%2e%2e", "a.", "C:", "\0", "..\\"]
    ),
    st.text(max_size=6),
    st.just("x" * 300),
    st.binary(max_size=4).map(lambda data: data.decode(errors="surrogateescape")),
)
RELATIVE = st.lists(PARTS, max_size=6).map("/".join)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("outside")
    (base / "secret.png").write_bytes(b"secret")
    root = base / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b.png").write_bytes(b"")
    (root / "link_out").symlink_to(base / "secret.png")
    (root / "link_up").symlink_to("..")
    (root / "link_in").symlink_to("a")
    (root / "loop").symlink_to("loop")
    return root


@settings(derandomize=True, max_examples=1000, deadline=None)
@given(RELATIVE)
def test_a_joined_path_never_leaves_the_root(root: Path, relative: str) -> None:
    with suppress(InputRefused):
        joined = safe_join(root, relative)
        inside = os.path.realpath(root)
        assert os.path.realpath(joined).startswith(inside + "/")
        assert joined.is_absolute()


@pytest.mark.parametrize("relative", ["a/b.png", "./a//b.png", "link_in/b.png"])
def test_a_path_inside_is_found(root: Path, relative: str) -> None:
    assert safe_join(root, relative) == root.resolve() / "a" / "b.png"


def test_a_new_file_may_be_named(root: Path) -> None:
    assert safe_join(root, "%2e%2e/new.png") == root.resolve() / "%2e%2e" / "new.png"


@pytest.mark.parametrize(
    "relative",
    [
        "",
        ".",
        "/etc/passwd",
        "../secret.png",
        "a/../../secret.png",
        "a/../b.png",
        "~/x",
        "a\0b",
        "..\\x",
        "C:/x",
        "link_out",
        "link_up/secret.png",
        "x" * 300,
        "a/" * 2100 + "b",
        "\ud800",
    ],
)
def test_what_leads_out_is_refused(root: Path, relative: str) -> None:
    with pytest.raises(InputRefused, match="points outside the folder") as refusal:
        safe_join(root, relative)
    assert refusal.value.code == "MANIFEST-REFUSED"
    assert str(refusal.value).isprintable()


def test_a_root_that_is_a_link_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert safe_join(tmp_path / "alias", "a/b.png") == root.resolve() / "a" / "b.png"
