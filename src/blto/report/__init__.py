"""Reports from records: one self-contained HTML page, and the same table for the terminal and for Markdown."""

from __future__ import annotations

from blto.report.page import build_report, render_report
from blto.report.tables import markdown_table, results_table

__all__ = ["build_report", "markdown_table", "render_report", "results_table"]
