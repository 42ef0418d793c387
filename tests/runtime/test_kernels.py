"""Compiled code is kept on disk where it can be; where it cannot, one line says so and everything works."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from blto.runtime import kernels

MODULE = """
from blto.runtime.kernels import kernel

@kernel()
def double(x):
    return 2 * x
"""


@pytest.fixture(autouse=True)
def nothing_said_before() -> None:
    kernels.warn_not_kept.cache_clear()


def load(path: Path) -> Any:
    """The function of a fresh module at `path`."""
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double


def test_machine_code_is_kept_beside_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(tmp_path / "kept.py")(21) == 42
    assert {path.suffix for path in (tmp_path / "__pycache__").iterdir()} == {".nbi", ".nbc"}
    assert capsys.readouterr().err == ""


def test_a_function_without_a_place_for_its_code_works_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        found: dict[str, Any] = {}
        exec(MODULE, found)  # from no file, so numba finds no folder
        assert found["double"](21) == 42
    assert told(capsys) == 1


def test_a_folder_that_is_lost_before_the_code_is_written_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    double = load(tmp_path / "lost.py")
    (tmp_path / "__pycache__").rmdir()
    (tmp_path / "__pycache__").write_text("in the way")
    assert double(21) == 42
    assert double(1.5) == 3.0
    assert told(capsys) == 1


def told(capsys: pytest.CaptureFixture[str]) -> int:
    """How many lines of standard error there are, each the warning with its advice."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("blto: warning: compiled code is not kept: ") for line in lines)
    assert all(line.endswith("set NUMBA_CACHE_DIR to a folder that can be written.") for line in lines)
    return len(lines)
