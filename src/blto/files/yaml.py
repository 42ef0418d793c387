"""Configuration files: YAML without surprises, and errors that name file, line and key.

Read are mappings, lists and scalars. Tags, anchors, duplicate keys, non-finite numbers and non-text keys are refused.
Plain scalars follow YAML 1.2 (`1e-3` is a number, `no` and `2024-01-01` are text), and a fraction such as `8/255` is a
number too, in files and after `--set` alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from blto.errors import ConfigError, InputRefused
from blto.files.reading import read_bytes
from blto.files.text import show

_MAX_BYTES = 1 << 18  # the longest configuration of ours is a few kB
_MAX_DEPTH = 32
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_FRACTION = re.compile(r"([-+]?[0-9]+(?:\.[0-9]+)?)/([0-9]+(?:\.[0-9]+)?)")
_NON_FINITE = re.compile(r"[-+]?\.?(inf|infinity)|\.?nan", re.IGNORECASE)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one configuration file.

    Raises:
        ConfigError: missing, over 256 KiB, not UTF-8, not YAML, or holding what is refused; as `file:line: key: why`.
    """
    node = _compose_file(path)
    return {} if node is None else _mapping(node, show(path), ())


def dump_yaml(value: Mapping[str, Any]) -> str:
    """Plain data as YAML text, keys in the order given; `load_yaml` reads back the same."""
    return yaml.dump(dict(value), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


_UNUSUAL_BREAKS = "\x85\u2028\u2029\ufeff"


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that occurs twice out twice, and quotes every text that `load_yaml` would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _is_text(text) else "'"
    if any(character in text for character in _UNUSUAL_BREAKS):
        style = '"'  # the one style that escapes them; in any other they are read back as spaces
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _represent_text)


def parse_assignment(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b=c` as a key path and a value; the value is read as YAML, fractions included.

    >>> parse_assignment("attack.epsilon=8/255")
    (('attack', 'epsilon'), 0.03137254901960784)
    """
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(
            f"--set {show(text)}: give key=value, with dots between nested keys (attack.poison_rate=0.01)."
        )
    return keys, parse_value(value, f"--set {show(key)}")


def parse_value(text: str, where: str) -> Any:
    """One value of the command line as YAML: a word, a number, a {mapping}. Raises ConfigError naming `where`."""
    node = _compose(text, where)
    return None if node is None else _construct(node, where, ())


def apply_assignments(config: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `config` with each `a.b=c` set, in order; missing levels are made, `config` itself stays as it was.

    A component given by its bare name (`attack: blto`) becomes `{"name": "blto"}` when a key inside it is set.
    """
    result = dict(config)
    for text in assignments:
        result = assign(result, *parse_assignment(text), said=f"--set {show(text)}")
    return result


def assign(config: Mapping[str, Any], keys: Sequence[str], value: Any, *, said: str) -> dict[str, Any]:
    """A copy of `config` with the value at the path `keys` set, as in `apply_assignments`.

    Raises:
        ConfigError: something on the way has no keys inside it; the message starts with `said`.
    """
    result = dict(config)
    level = result
    for depth, key in enumerate(keys[:-1]):
        inner = level.get(key)
        if inner is not None and not isinstance(inner, dict | str):
            taken = ".".join(keys[: depth + 1])
            raise ConfigError(f"{said}: {show(taken)} is {show(inner)}, which has no keys inside it.")
        level[key] = {"name": inner} if isinstance(inner, str) else dict(inner or {})
        level = level[key]
    level[keys[-1]] = value
    return result


def with_position(error: ConfigError, path: Path) -> ConfigError:
    """The same error with the file in front, and the line where the message starts with a key that the file has.

    Messages about a configuration start with the dotted key, as `attack.poison_rate: ...`. A key that the file lacks
    (a default, or one from `--set`) gives the file alone.
    """
    return ConfigError(f"{place(path, str(error).partition(': ')[0])}: {error}", code=error.code)


def place(path: Path, key: str) -> str:
    """`file:line` of a dotted key, or of the innermost of its levels that the file has; without any, the file.

    A key of the file may hold dots itself (`attack.epsilon: ...`): the longest that fits is taken.
    """
    keys, node, line = key.split("."), _compose_file(path), None
    while keys:
        names = ((length, ".".join(keys[:length])) for length in range(len(keys), 0, -1))
        found = next(((length, inside) for length, name in names if (inside := _inside(node, name))), None)
        if found is None:
            break
        length, (mark, node) = found
        keys, line = keys[length:], mark.line + 1 if mark else None
    return show(path) if line is None else f"{show(path)}:{line}"


def _inside(node: yaml.Node | None, key: str) -> tuple[yaml.Mark | None, yaml.Node] | None:
    """Where `key` (of a list, a number from 0) stands in `node`, and its value."""
    if isinstance(node, yaml.MappingNode):
        return next(((name.start_mark, value) for name, value in node.value if name.value == key), None)
    if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
        return node.value[int(key)].start_mark, node.value[int(key)]
    return None


def _compose_file(path: Path) -> yaml.Node | None:
    """The file as a tree of nodes with positions; nothing is constructed."""
    try:
        data = read_bytes(path, max_bytes=_MAX_BYTES)
    except InputRefused as error:  # a configuration is part of the command, so this is a usage error
        raise ConfigError(str(error)) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{show(path)}:{line}: not UTF-8 text; give a YAML file.") from error
    return _compose(text, show(path))


def _compose(text: str, where: str) -> yaml.Node | None:
    """Parse `text` to nodes. Composing recurses, so depth is checked on the flat events first."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            refusal = _refusal(event, depth)
            if refusal:
                raise ConfigError(f"{_at(where, event)}: {refusal}")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = where if mark is None or where.startswith("--set") else f"{where}:{mark.line + 1}"
        raise ConfigError(f"{place}: not YAML ({show(getattr(error, 'problem', None) or error)}).") from error


def _refusal(event: yaml.Event, depth: int) -> str | None:
    if depth > _MAX_DEPTH:
        return f"nested deeper than {_MAX_DEPTH} levels."
    if getattr(event, "anchor", None):
        return "anchors and aliases (& and *) are not accepted; write the value out, or put it in quotes."
    if getattr(event, "tag", None):
        return "tags (!) are not accepted; write a plain value, or put it in quotes."
    return None


def _construct(node: yaml.Node, where: str, keys: tuple[str, ...]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, where, keys)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, where, (*keys, str(i))) for i, item in enumerate(node.value)]
    text = str(node.value)
    if getattr(node, "style", None) is not None:  # quoted or block text is text
        return text
    try:
        return _scalar(text)
    except ValueError as error:
        raise ConfigError(f"{_place(node, where, keys)}: {error}") from error


def _mapping(node: yaml.Node, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_place(node, where, keys)}: expected `key: value` pairs.")
    result: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or not key.value or key.value == "<<":
            raise ConfigError(f"{_place(key, where, keys)}: a key is plain text, on one line.")
        inner = (*keys, key.value)
        if key.value in result:
            raise ConfigError(f"{_place(key, where, inner)}: given twice; keep one.")
        result[key.value] = _construct(value, where, inner)
    return result


def _place(node: yaml.Node, where: str, keys: tuple[str, ...]) -> str:
    return f"{_at(where, node)}: {show('.'.join(keys))}" if keys else _at(where, node)


def _at(where: str, item: yaml.Node | yaml.Event) -> str:
    """File and line; what was typed after `--set` has no line worth naming."""
    mark = item.start_mark
    return where if mark is None or where.startswith("--set") else f"{where}:{mark.line + 1}"


def _is_text(text: str) -> bool:
    try:
        return isinstance(_scalar(text), str)
    except ValueError:
        return False


def _scalar(text: str) -> bool | int | float | str | None:
    """What a plain scalar means. Raises ValueError for a number that is not finite."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    fraction = _FRACTION.fullmatch(text)
    if _INTEGER.fullmatch(text) and len(text) <= 20:
        return int(text)
    if _NON_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number.")
    if not fraction and not _FLOAT.fullmatch(text):
        return text
    if fraction and not float(fraction[2]):
        raise ValueError(f"{show(text)} divides by zero.")
    value = float(fraction[1]) / float(fraction[2]) if fraction else float(text)
    if not math.isfinite(value):
        raise ValueError(f"{show(text)} is not a finite number.")
    return value
