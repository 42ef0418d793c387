from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blto.files.yaml import dump_yaml
from blto.sweep.plan import Sweep, read_sweep
from tests.tiny_experiment import TINY_EXPERIMENT


@pytest.fixture(scope="session")
def make_sweep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sweep]:
    """A sweep with one cell for each seed that is given."""

    def make(*seeds: int, **keys: object) -> Sweep:
        file: Path = tmp_path_factory.mktemp("sweep") / "toy.yaml"
        file.write_text(dump_yaml({"base": TINY_EXPERIMENT, "seeds": list(seeds), **keys}))
        return read_sweep(file)

    return make
