"""Every error code that the source can print is documented, and met by a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from blto import errors

ROOT = Path(__file__).parent.parent
CODE = re.compile(r"[A-Z]{2,}(?:-[A-Z]{2,})+")


def codes() -> set[str]:
    """The codes of the error classes, and every literal of the form WORD-WORD in the source."""
    found = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                found.add(node.value)
    return found


TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != Path(__file__).name)


@pytest.mark.parametrize("code", sorted(codes()))
def test_a_code_is_documented_and_met_by_a_test(code: str) -> None:
    assert re.search(rf"\b{code}\b", TESTS), "no test meets it"
    assert re.search(rf"`{code}`", (ROOT / "README.md").read_text()), "the README's table of exit codes lacks it"


def test_the_readme_names_no_code_that_does_not_exist() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| [\d, ]+ \|", line)]
    assert set(re.findall(r"`([A-Z-]+)`", "\n".join(rows))) == codes()
