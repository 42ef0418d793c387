"""What the HTML pages share: how a template is read, and the stylesheet."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup


def template(folder: str, name: str, **filters: Callable[..., Any]) -> Template:
    """The template `name` in a folder of the package; all text is escaped, and a name that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("blto", folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)


def stylesheet() -> Markup:
    """The pages' CSS."""
    return Markup(resources.files("blto.report").joinpath("report.css").read_text(encoding="utf-8"))
