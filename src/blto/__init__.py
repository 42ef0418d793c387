"""blto: bi-level trigger optimisation against contrastive pretraining, its baselines, and what defends against it.

Every command of the command line is a function here, with the same name and arguments. Each is imported on first use,
so `import blto` costs nothing and does not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blto.cli.catalog import show
    from blto.poisoning import load_trigger, verify
    from blto.records import load_record

__all__ = ["load_record", "load_trigger", "show", "verify"]

_HOMES = {
    "load_record": "blto.records",
    "load_trigger": "blto.poisoning",
    "show": "blto.cli.catalog",
    "verify": "blto.poisoning",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'blto' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Package(ModuleType):
    """Keeps the function `blto.report` where importing the package `blto.report` would put a module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
