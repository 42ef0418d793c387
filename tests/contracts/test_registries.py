"""What every registry entry owes: a card, a configuration derived from its signature, and errors that help."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
from importlib import import_module
from typing import Any

import pytest

import blto
from blto.errors import ConfigError
from blto.registry import Registry

# Arguments without a default, because only the user knows them.
REQUIRED: dict[str, Any] = {"target_class": 0, "path": "folder"}


def registries() -> dict[str, Registry[Any]]:
    """Every registry in the `__init__` of a package, by kind; found, not listed, so a new one is tested at once."""
    packages = [import_module(f"blto.{found.name}") for found in pkgutil.iter_modules(blto.__path__) if found.ispkg]
    found = (value for package in packages for value in vars(package).values() if isinstance(value, Registry))
    return {registry.kind: registry for registry in found}


REGISTRIES = registries()
ENTRIES = [
    pytest.param(registry, name, id=f"{kind}-{name}")
    for kind, registry in sorted(REGISTRIES.items())
    for name in registry.names()
]
each_entry = pytest.mark.parametrize(("registry", "name"), ENTRIES)


def spec_of(registry: Registry[Any], name: str) -> dict[str, Any]:
    """The shortest spec that builds this component."""
    fields = registry.schema(name).model_fields
    return {"name": name, **{key: REQUIRED[key] for key, field in fields.items() if field.is_required()}}


def test_every_promised_registry_exists() -> None:
    assert set(REGISTRIES) >= {"attack", "backbone", "dataset", "generator", "method"}


@each_entry
def test_card_is_complete(registry: Registry[Any], name: str) -> None:
    card = registry.card(name)
    assert card.title
    assert card.summary
    for text in dataclasses.astuple(card):
        assert not isinstance(text, str) or (text == text.strip() and "\n" not in text)
    assert bool(card.paper) == bool(card.year), "a paper has a year"
    if registry.kind in {"attack", "defense"}:
        assert card.threat_model, "say what the attacker or the defender can see and do"
    if registry.kind == "attack" and name != "clean":
        assert card.norm
    assert registry.cards()[name]["title"] == card.title


@each_entry
def test_the_constructor_is_the_configuration(registry: Registry[Any], name: str) -> None:
    parameters = inspect.signature(registry.get(name)).parameters.values()
    assert not [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD], (
        "a typo would vanish in **kwargs"
    )
    hyper = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert all(p.annotation is not inspect.Parameter.empty for p in hyper)
    schema = registry.schema(name).model_json_schema()
    assert set(schema.get("properties", {})) == {p.name for p in hyper}
    assert schema["additionalProperties"] is False
    json.dumps(schema, allow_nan=False)


@each_entry
def test_defaults_resolve_and_survive_json(registry: Registry[Any], name: str) -> None:
    resolved = registry.resolve(spec_of(registry, name))
    assert resolved["name"] == name
    came_later = {key for key, field in registry.schema(name).model_fields.items() if field.exclude_if is not None}
    assert set(resolved) == {"name", *registry.schema(name).model_fields} - came_later
    text = json.dumps(resolved, allow_nan=False)
    assert registry.resolve(json.loads(text)) == resolved


@each_entry
def test_every_key_refuses_the_wrong_type_by_name(registry: Registry[Any], name: str) -> None:
    for key in registry.schema(name).model_fields:
        with pytest.raises(ConfigError, match=rf"^here\.{key}\b"):
            registry.resolve({**spec_of(registry, name), key: {"no such": ["thing"]}}, "here")


@each_entry
def test_an_unknown_key_is_named_with_the_nearest_known_one(registry: Registry[Any], name: str) -> None:
    for key in registry.schema(name).model_fields:
        with pytest.raises(ConfigError) as caught:
            registry.resolve({**spec_of(registry, name), f"{key}z": 1}, "here")
        assert str(caught.value).startswith(f'here.{key}z: unknown key; did you mean "{key}"?')
    with pytest.raises(ConfigError, match=r"^here\.qqq: unknown key"):
        registry.resolve({**spec_of(registry, name), "qqq": 1}, "here")


@each_entry
def test_an_unknown_name_gets_the_nearest_known_one(registry: Registry[Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.resolve(f"{name}z")
    assert f'unknown {registry.kind} "{name}z"; did you mean "{name}"?' in str(caught.value)
    assert caught.value.exit_code == 2
