"""Write the results table of README.md from the committed records. To run: python benchmarks/readme_table.py"""

from __future__ import annotations

from pathlib import Path

from blto.files import write_text
from blto.records import RunStore
from blto.report.tables import markdown_table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"


def with_table(readme: str, results: Path) -> str:
    """The README's text with the table of every record under `results` between its two marks."""
    records = [record for store in sorted(results.iterdir()) if store.is_dir() for record in RunStore(store).list()]
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{markdown_table(records).strip()}\n{END}{after}"


if __name__ == "__main__":
    file = ROOT / "README.md"
    write_text(file, with_table(file.read_text(), ROOT / "benchmarks" / "results"))
