"""The components as data: every card, and every option with its type, range, default and meaning."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from blto.errors import ConfigError, nearest
from blto.records import RunStore
from blto.registry import Registry

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_REFERENCE = re.compile(r"\bas in ((?:every )?\w+)")
_ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def registries() -> dict[str, Registry[Any]]:
    """Every registry, by the kind of component it holds."""
    from blto.attacks import ATTACKS
    from blto.data import DATASETS
    from blto.defenses import DEFENSES
    from blto.models import BACKBONES, GENERATORS
    from blto.pretraining import METHODS

    return {registry.kind: registry for registry in (ATTACKS, DEFENSES, METHODS, BACKBONES, GENERATORS, DATASETS)}


def list_all(kind: str | None = None, *, store: str | os.PathLike[str] = "runs") -> dict[str, dict[str, Any]]:
    """All components and runs by kind and name: a component's card (a defense's has its status), a run's record.

    Args:
        kind: "attack", "defense", "method", "backbone", "generator", "dataset" or "run"; None is all.
        store: folder of the runs.

    Raises:
        ConfigError: an unknown kind.
    """
    known = registries()
    if kind not in (None, "run", *known):
        raise ConfigError(f'unknown kind "{kind}"; {nearest(str(kind), [*known, "run"])}.')
    found: dict[str, dict[str, Any]] = {
        each: {name: card | _evidence(registry, name) for name, card in registry.cards().items()}
        for each, registry in known.items()
        if kind in (None, each)
    }
    if kind in (None, "run"):
        found["run"] = {record.run_id: record for record in RunStore(Path(store)).list()}
    return found


def show(name: str) -> dict[str, Any]:
    """One component in full: `kind`, `name`, `card` and `options` (key, accepts, default, meaning).

    Args:
        name: as listed; `kind:name` where two kinds share a name; `timm/...` and `torchvision/...` work too.

    Raises:
        ConfigError: unknown, with the nearest known name.
    """
    known = registries()
    kind, colon, bare = name.rpartition(":")
    if colon and kind not in known:
        raise ConfigError(f'unknown kind "{kind}"; {nearest(kind, known)}.')
    names = sorted({each for registry in known.values() for each in registry.names()})
    for registry in [known[kind]] if colon else known.values():
        if bare in registry.names() or (registry.kind == "backbone" and "/" in bare):
            component = registry.get(bare)
            options = _options(registry.schema(bare), inspect.getdoc(component) or "", "")
            for option in options:
                option["meaning"] = _spelled_out(option["meaning"], option["key"], component, registry)
            card = asdict(registry.card(bare)) | _evidence(registry, bare)
            return {"kind": registry.kind, "name": bare, "card": card, "options": options}
    raise ConfigError(f'unknown component "{name}"; {nearest(bare, names)}.')


def _evidence(registry: Registry[Any], name: str) -> dict[str, str]:
    """Of a component that has to show what it does: its status and why; else nothing."""
    evidence = getattr(registry.get(name), "evidence", None)
    return {} if evidence is None else {"status": evidence.status, "evidence": evidence.said}


def _options(model: type[BaseModel], docs: str, prefix: str, given: Any = None) -> list[dict[str, Any]]:
    """One row per key; the keys of a nested model follow it with its own key in front.

    Args:
        docs: the docstring that explains the keys.
        prefix: dotted keys in front of these.
        given: the instance that is the default here, where a class's own defaults are overruled.
    """
    properties = model.model_json_schema()["properties"]
    defaults = given.model_dump(mode="json") if isinstance(given, BaseModel) else {}
    meanings = _meanings(docs)
    rows: list[dict[str, Any]] = []
    for key, field in model.model_fields.items():
        nested: Any = field.annotation
        row = {"key": prefix + key, "required": field.is_required(), "meaning": meanings.get(key, "")}
        if inspect.isclass(nested) and issubclass(nested, BaseModel):
            rows.append({**row, "accepts": "its own keys, below", "default": None})
            inner = getattr(given, key, field.default)
            rows += _options(nested, inspect.getdoc(nested) or "", f"{prefix}{key}.", inner)
        else:
            default = defaults.get(key, properties[key].get("default"))
            rows.append({**row, "accepts": _accepts(properties[key]), "default": default})
    return rows


def _accepts(schema: dict[str, Any]) -> str:
    """A property's JSON schema in words: `number > 0 and <= 1`, `"sgd" or "lars"`."""
    if "enum" in schema or "const" in schema:
        return " or ".join(f'"{value}"' for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(_accepts(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return "mapping"
    kind = {"object": "name or mapping", "array": "list", "null": "null"}.get(schema.get("type", ""))
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema)
    return f"{kind or schema.get('type', 'any')} {bounds}".strip()


def _spelled_out(meaning: str, key: str, component: Any, registry: Registry[Any]) -> str:
    """ "as in every attack" and "as in BLTO" replaced by what is said of the key there."""
    found = _REFERENCE.search(meaning)
    if not found:
        return meaning
    titles = {registry.card(name).title: registry.get(name) for name in registry.names()}
    bases, named = inspect.getmro(component)[1:], titles.get(found[1])
    sources = bases if found[1] == f"every {registry.kind}" else [named] if named else []
    told = ((source, _meanings(inspect.getdoc(source) or "").get(key)) for source in sources)
    source, said = next(((source, said) for source, said in told if said), (None, None))
    if said is None:
        return meaning
    said = _spelled_out(said, key, source, registry).removesuffix(".")
    return f"{meaning[: found.start()]}{said}{meaning[found.end() :]}"


def _meanings(docs: str) -> dict[str, str]:
    """The `Args:` and `Attributes:` entries of a docstring, each on one line."""
    meanings: dict[str, str] = {}
    current: list[str] = []
    inside = False
    for line in docs.splitlines():
        if line and not line.startswith(" "):
            inside = line in {"Args:", "Attributes:"}
        entry = _ENTRY.fullmatch(line) if inside else None
        if entry:
            current = entry[1].split(", ")
            meanings.update(dict.fromkeys(current, entry[2]))
        elif inside and line.startswith("        "):
            meanings.update({key: f"{meanings[key]} {line.strip()}" for key in current})
    return meanings
