"""Where in a checkpoint its tensors are: the mappings that hold some, by the path to them."""

from __future__ import annotations

from typing import Any, TypeAlias

from blto.files.foreign.pickles import RefusedError
from blto.files.foreign.weights import Tensor

MAX_TENSORS, MAX_NESTING = 100_000, 64
MOST_SHARED = 8
"""Times that all tensors together may exceed the file: weights are stored twice at most, and bfloat16 is widened."""
Trail: TypeAlias = "tuple[Trail, str] | None"
"""The keys that lead to a mapping, the innermost first; a text only where one is wanted."""


def grouped(value: Any, size: int) -> dict[str, dict[str, Tensor]]:
    """Every mapping in `value` that holds tensors itself, by the dotted path to it ("" for `value`): name -> tensor.

    Lists and tuples are walked as mappings of their numbers. Each object is visited once, so a value that contains
    itself ends.

    Args:
        value: what the pickle leaves.
        size: of the whole file, in bytes.

    Raises:
        RefusedError: nested too deeply, no tensor at all, too many, or more views of the same bytes than weights ever
            share.
    """
    found: dict[str, dict[str, Tensor]] = {}
    if type(value) not in (dict, list, tuple):
        raise RefusedError("it holds no tensor in a mapping")
    entries = copied = 0
    seen = {id(value)}
    waiting: list[tuple[Any, Trail, int]] = [(value, None, 0)]
    while waiting:
        node, trail, depth = waiting.pop()
        if depth > MAX_NESTING:
            raise RefusedError(f"it is nested more than {MAX_NESTING} deep")
        held: dict[str, Tensor] = {}
        for key, entry in node.items() if type(node) is dict else enumerate(node):
            if isinstance(entry, Tensor):
                held[str(key)] = entry
                entries, copied = entries + 1, copied + entry.nbytes
                if entries > MAX_TENSORS or copied > MOST_SHARED * size:
                    raise RefusedError("it has more tensors than weights are, or they share their bytes too often")
            elif type(entry) in (dict, list, tuple) and id(entry) not in seen:
                seen.add(id(entry))
                waiting.append((entry, (trail, str(key)), depth + 1))
        if held and found.setdefault(_dotted(trail), held) is not held:
            raise RefusedError("it has two mappings of one name")
    if not found:
        raise RefusedError("it holds no tensor in a mapping")
    return found


def _dotted(trail: Trail) -> str:
    """A trail as text, outermost key first."""
    keys: list[str] = []
    while trail is not None:
        trail, key = trail
        keys.append(key)
    return ".".join(reversed(keys))
