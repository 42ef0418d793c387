"""blto: bi-level trigger optimisation against contrastive pretraining, its baselines, and what defends against it.

Every command of the command line is a function here, with the same name and arguments. Each is imported on first use,
so `import blto` costs nothing and does not import torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:  # OpenMP reads it while torch is loaded
    # For how long a thread that has nothing to do spins: by default for milliseconds, on the core on which the views'
    # other half is to be rendered.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from blto.api import (
        check_trigger,
        craft,
        evaluate,
        load_encoder,
        load_record,
        load_trigger,
        poison,
        pretrain,
        report,
        run,
        sweep,
        verify,
    )
    from blto.audit.scan import scan, scan_data
    from blto.catalog import list_all as list
    from blto.catalog import show
    from blto.demo import demo

__all__ = [
    "check_trigger",
    "craft",
    "demo",
    "evaluate",
    "list",
    "load_encoder",
    "load_record",
    "load_trigger",
    "poison",
    "pretrain",
    "report",
    "run",
    "scan",
    "scan_data",
    "show",
    "sweep",
    "verify",
]

_HOMES = {name: f"blto.api:{name}" for name in __all__} | {
    "demo": "blto.demo:demo",
    "list": "blto.catalog:list_all",
    "scan": "blto.audit.scan:scan",
    "scan_data": "blto.audit.scan:scan_data",
    "show": "blto.catalog:show",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'blto' has no attribute {name!r}")
    module, _, function = _HOMES[name].partition(":")
    value = getattr(import_module(module), function)
    globals()[name] = value
    return value


def __dir__() -> Iterable[str]:
    return sorted({*globals(), *_HOMES})


class _Package(ModuleType):
    """Keeps `blto.report`, `blto.sweep` and `blto.demo` functions where importing the modules would replace them."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
