"""The README's results table is the one that the committed records give."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_results_table_is_up_to_date() -> None:
    with_table = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["with_table"]
    readme = (ROOT / "README.md").read_text()
    assert with_table(readme, ROOT / "benchmarks" / "results") == readme
