"""The README's tables are those that the committed records give."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_up_to_date() -> None:
    with_tables = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["with_tables"]
    readme = (ROOT / "README.md").read_text()
    assert with_tables(readme, ROOT / "benchmarks" / "results") == readme
