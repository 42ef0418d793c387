"""`import blto` and every `--help` are quick: no torch, and nothing that a command does not need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "lightly", "timm", "numba", "sklearn", "scipy", "pyarrow", "matplotlib")
PROBE = f"import sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"


def loaded_by(code: str) -> str:
    """The heavy packages that are in memory after `code` ran in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "modules",
    ["blto", "blto.errors, blto.registry, blto.records, blto.files, blto.files.yaml", "blto.attacks, blto.data.images"],
)
def test_importing_is_light(modules: str) -> None:
    assert loaded_by(f"import {modules}; {PROBE}") == "[]"


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_idle_threads_spin_for_a_short_time_unless_told_otherwise(given: dict[str, str], expected: str) -> None:
    code = "import os, blto; print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {key: value for key, value in os.environ.items() if key not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean | given)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("arguments", [["--help"], ["show", "--help"], ["nonsense"]])
def test_help_and_usage_errors_are_light(arguments: list[str]) -> None:
    assert loaded_by(f"from blto.cli import main; main({arguments!r}); {PROBE}") == "[]"


def test_public_names_resolve_and_packages_do_not_hide_functions() -> None:
    code = "import blto, blto.report, blto.cli; print(all(callable(getattr(blto, name)) for name in blto.__all__))"
    assert loaded_by(code) == "True"
