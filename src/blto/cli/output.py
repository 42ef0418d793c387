"""Results on standard output: a table for a reader, JSON for a program. Text from outside is never read as markup."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from blto.files.text import show

_WIDTH_OF_A_PIPE = 160  # no terminal says how wide: wide enough for one line a row


def print_json(value: Any) -> None:
    """One JSON document; NaN never gets out as a bare word."""
    sys.stdout.write(json.dumps(value, allow_nan=False, indent=1) + "\n")


def print_text(item: RenderableType) -> None:
    """Text or a table, as wide as the terminal; a plain string is taken literally."""
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    console.print(Text(item) if isinstance(item, str) else item)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A borderless table of any values, shown literally."""
    result = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        result.add_row(*(Text(show(cell)) for cell in row))
    return result


def components_table(listing: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """What `blto list` prints: one row per component."""
    rows = [
        (kind, name, card["summary"], card["paper"]) for kind, cards in listing.items() for name, card in cards.items()
    ]
    return table(("KIND", "NAME", "WHAT IT IS", "PAPER"), rows)


def component_text(component: Mapping[str, Any]) -> list[RenderableType]:
    """What `blto show` prints: the card, then a row per option."""
    card = component["card"]
    source = ", ".join(str(part) for part in (card["paper"], card["year"]) if part)
    facts = [("paper", source), ("threat model", card["threat_model"]), ("norm", card["norm"])]
    lines = [f"{component['name']} ({component['kind']}): {card['title']}, {card['summary']}"]
    lines += [f"{name}: {value}" for name, value in facts if value]
    rows = [(option["key"], option["accepts"], _default(option), option["meaning"]) for option in component["options"]]
    items: list[RenderableType] = [show(line, 1000) for line in lines]
    return [*items, "", table(("KEY", "ACCEPTS", "DEFAULT", "MEANING"), rows)] if rows else items


def _default(option: Mapping[str, Any]) -> str:
    if option["required"]:
        return "(required)"
    value = option["default"]
    if isinstance(value, dict):
        return str(value.get("name", json.dumps(value)))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
