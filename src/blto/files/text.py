"""Text from outside (file names, class names, other libraries' messages) made safe to print on one line."""

from __future__ import annotations

import os

# Letters and marks that `str.isprintable` accepts although nothing is drawn: they could hide part of a name.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


def show(text: object, limit: int = 200) -> str:
    r"""`text` as one printable line of at most `limit` characters.

    Control characters, C1, bidirectional and zero-width marks, unusual spaces and undecodable bytes become `\x1b` or
    `\u202e`; a longer text keeps its start and its end. Showing twice changes nothing.

    >>> show("cat\x1b[2J.png")
    'cat\\x1b[2J.png'
    """
    raw = os.fsdecode(text) if isinstance(text, bytes | os.PathLike) else str(text)
    if len(raw) > 2 * limit:  # what is cut away below need not be escaped first
        raw = raw[:limit] + raw[-limit:]
    line = "".join(map(_visible, raw))
    if len(line) <= limit:
        return line
    head = max(limit - 3, 0) // 2
    tail = max(limit - 3, 0) - head
    return (line[:head] + "..." + line[len(line) - tail :])[:limit]


def _visible(character: str) -> str:
    if character.isprintable() and character not in _INVISIBLE:
        return character
    number = ord(character)
    if number <= 0xFF:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"
