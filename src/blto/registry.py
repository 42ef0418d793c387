"""Registries of components, and the rule that a constructor's signature is its configuration.

A component is a class whose keyword-only, annotated constructor arguments are its hyper-parameters. From that signature
comes the pydantic schema that validates YAML, fills in defaults and is printed by `blto show NAME`; there is no second
config class to keep in step. Entries are `"module:Class"` strings, so naming a component does not import torch.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from blto.errors import BltoError, ConfigError, nearest

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Card:
    """What a component is and where it comes from, as data: shown by `blto show`, the docs and the report."""

    title: str
    summary: str
    paper: str = ""
    year: int = 0
    threat_model: str = ""
    norm: str = ""


class Component(Protocol[T_co]):
    """What a registry holds: a class (or a callable object) with a card, configured by keyword-only arguments."""

    card: Card

    def __call__(self, *collaborators: Any, **hyper_parameters: Any) -> T_co:
        """Construct the component."""
        ...


class Registry(Generic[T]):
    """Names of one kind of component, each resolved on first use.

    Args:
        kind: the word used in messages ("attack").
        entries: name -> "module:attribute".
        pattern: resolves names that are not listed (`timm/...`): given the name, returns a component or None.
    """

    def __init__(
        self, kind: str, entries: Mapping[str, str], *, pattern: Callable[[str], Component[T] | None] | None = None
    ) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self._pattern = pattern

    def names(self) -> list[str]:
        """All listed names, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> Component[T]:
        """The component behind `name`. Raises ConfigError with the nearest known name."""
        if name in self._entries:
            module, _, attribute = self._entries[name].partition(":")
            return typing.cast(Component[T], getattr(import_module(module), attribute))
        component = self._pattern(name) if self._pattern else None
        if component is None:
            raise ConfigError(f'unknown {self.kind} "{name}"; {nearest(name, self._entries)}.')
        return component

    def schema(self, name: str) -> type[BaseModel]:
        """The pydantic model of a component's keyword-only arguments: extra keys forbidden, values frozen."""
        return signature_schema(self.get(name), name)

    def resolve(self, spec: Mapping[str, Any] | str, where: str = "") -> dict[str, Any]:
        """Validate `{"name": ..., **arguments}` (or a bare name) and fill in every default.

        Raises:
            ConfigError: unknown name, unknown key, wrong type or out of range; the message names the key under `where`.
        """
        where = where or self.kind
        if not isinstance(spec, str | Mapping):
            raise ConfigError(f"{where}: {spec!r:.60} is neither a {self.kind}'s name nor a mapping with a name.")
        given: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"{where}: needs a name; {nearest(str(name), self._entries)}.")
        try:
            schema = self.schema(name)
        except ConfigError as error:
            raise ConfigError(f"{where}.name: {error}") from error
        return {"name": name, **validate(schema, given, where).model_dump(mode="json")}

    def build(self, spec: Mapping[str, Any] | str, *collaborators: Any) -> T:
        """Construct a component from its spec; `collaborators` are its positional arguments."""
        resolved = self.resolve(spec)
        name = resolved.pop("name")
        model = validate(self.schema(name), resolved, self.kind)
        return self.get(name)(*collaborators, **{field: getattr(model, field) for field in type(model).model_fields})

    def card(self, name: str) -> Card:
        """The component's card."""
        return self.get(name).card

    def cards(self) -> dict[str, dict[str, Any]]:
        """All cards as plain data."""
        return {name: asdict(self.card(name)) for name in self.names()}


def signature_schema(component: Callable[..., Any], name: str) -> type[BaseModel]:
    """Derive a pydantic model from the keyword-only arguments of `component`."""
    if inspect.isclass(component):
        target: Any = component.__init__
    else:
        target = component if inspect.isfunction(component) else type(component).__call__
    hints = typing.get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    for argument in inspect.signature(component).parameters.values():
        if argument.kind is inspect.Parameter.KEYWORD_ONLY:
            default = ... if argument.default is inspect.Parameter.empty else argument.default
            fields[argument.name] = (hints[argument.name], default)
    config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    return create_model(f"{name}_spec", __config__=config, **fields)


def later_option(default: Any) -> Any:
    """For the annotation of a field that a spec got after results had been stored.

    At its default, `default`, it is left out of what the spec dumps, so that all earlier results keep their hashes.
    """
    return Field(exclude_if=lambda value: value == default)


M = TypeVar("M", bound=BaseModel)
_INSIDE = re.compile(r"\w+((?:\.\w+)+): (.*)")


def validate(model: type[M], given: Mapping[str, Any], where: str) -> M:
    """Build `model` from `given`; the first problem becomes one ConfigError line that names the key under `where`."""
    try:
        built = model.model_validate(dict(given))
    except ValidationError as error:
        problems = error.errors()
        unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
        problem = (unknown or problems)[0]  # a misspelled key also leaves a required one missing: name the misspelling
        key = ".".join(str(part) for part in (where, *problem["loc"]) if str(part))
        if unknown:
            known = _fields_at(model, problem["loc"][:-1])
            raise ConfigError(f"{key}: unknown key; {nearest(str(problem['loc'][-1]), known)}.") from error
        cause = getattr(problem.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(cause, BltoError):  # a component's own spec: its message says what was given
            inside = _INSIDE.fullmatch(str(cause))
            raise ConfigError(f"{key}{inside[1]}: {inside[2]}" if inside else f"{key}: {cause}") from error
        value = problem.get("input")
        shown = f" (given: {value!r:.60})" if problem["type"] != "missing" else ""
        message = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {message[0].lower()}{message[1:]}{shown}.") from error
    _refuse_truth_for_numbers(given, built, where)
    return built


def _refuse_truth_for_numbers(given: Mapping[str, Any], built: BaseModel, where: str) -> None:
    """`seed: true` is a slip, not the number 1, which pydantic would make of it."""
    for name, value in given.items():
        # A key that a field's own reading has used up (the `name` of a view recipe) is no attribute of what was built.
        got, key = getattr(built, name, None), f"{where}.{name}".removeprefix(".")
        if isinstance(value, bool) and isinstance(got, int | float) and not isinstance(got, bool):
            raise ConfigError(f"{key}: input should be a number, not true or false (given: {value}).")
        if isinstance(value, Mapping) and isinstance(got, BaseModel):
            _refuse_truth_for_numbers(value, got, key)


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that are known where `location` leads inside `model`."""
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not inspect.isclass(field.annotation) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return sorted(model.model_fields)
