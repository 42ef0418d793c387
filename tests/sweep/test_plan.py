"""From a sweep's file to its cells: their order, their names, and the line that is to blame for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blto.cli import main
from blto.errors import ConfigError
from blto.files.yaml import dump_yaml
from blto.sweep.plan import read_sweep
from tests.tiny_experiment import TINY_EXPERIMENT

BASE = "base: base.yaml\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(dump_yaml({**TINY_EXPERIMENT, "controls": ["clean"]}))
    return tmp_path / "sweep.yaml"


def test_named_cells_come_first_then_the_grid_and_the_seeds_are_outermost(file: Path) -> None:
    file.write_text(
        BASE
        + """
cells:
  - name: nothing
    set: {attack: clean}
  - name: pinned
    set: {seed: 7}
grid:
  attack.poison_rate: [0.05, 0.1]
  pretraining.epochs: [1, 2]
seeds: [0, 1]
expected_hours: 1/2
"""
    )
    sweep = read_sweep(file)
    assert (sweep.name, sweep.expected_hours) == ("sweep", 0.5)
    grid = [f"poison_rate={rate}-epochs={epochs}" for rate in (0.05, 0.1) for epochs in (1, 2)]
    expected = [("nothing", 0), ("pinned", 7), *((name, 0) for name in grid)]
    expected += [("nothing", 1), *((name, 1) for name in grid)]
    assert [(cell.name, cell.spec.seed) for cell in sweep.cells] == expected
    assert len({cell.id for cell in sweep.cells}) == len(sweep.cells)
    third = sweep.cells[3]
    assert (third.spec.attack["poison_rate"], third.spec.pretraining.epochs) == (0.05, 2)
    assert sweep.cells[0].spec.attack["name"] == "clean"
    assert third.id == f"{third.name}-s0-{third.spec.run_id[-10:]}"


def test_a_base_may_be_written_out_and_components_may_be_values(file: Path) -> None:
    variants = [{**TINY_EXPERIMENT["pretraining"], "epochs": epochs} for epochs in (1, 2)]
    content: dict[str, Any] = {"name": "mine", "base": TINY_EXPERIMENT, "grid": {"pretraining": variants}}
    file.write_text(dump_yaml(content))
    sweep = read_sweep(file)
    assert sweep.name == "mine"
    assert [cell.spec.pretraining.epochs for cell in sweep.cells] == [1, 2]
    assert len({cell.name for cell in sweep.cells}) == 2
    assert all(cell.spec.seed == TINY_EXPERIMENT["seed"] for cell in sweep.cells)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE, "sweep.yaml: grid: there is nothing to run; give grid, cells or seeds."),
        (BASE + "grid: {}", "sweep.yaml:2: grid: is empty"),
        (BASE + "cells: []", "sweep.yaml:2: cells: is empty"),
        (BASE + "grid:\n  attack.epsilon: []", "sweep.yaml:3: grid.attack.epsilon: has no values"),
        (BASE + "gird: {a: [1]}", 'sweep.yaml:2: gird: unknown key; did you mean "grid"?'),
        (BASE + "seeds: [0, -1]", "sweep.yaml:2: seeds.1: input should be greater than or equal to 0"),
        (BASE + "seeds: [0]\nexpected_hours: 0", "sweep.yaml:3: expected_hours: input should be greater than 0"),
        (
            BASE + "cells:\n  - name: a\n    sett: {seed: 1}",
            'sweep.yaml:4: cells.0.sett: unknown key; did you mean "set"?',
        ),
        (BASE + "cells:\n  - name: a b", "sweep.yaml:3: cells.0.name: string should match pattern"),
        (
            BASE + "cells:\n  - name: a\n  - name: b\n    set:\n      attack.poison_rte: 0.1",
            'sweep.yaml:6: cell b: attack.poison_rte: unknown key; did you mean "poison_rate"?',
        ),
        (
            BASE + "grid:\n  attack.poison_rate:\n    - 0.05\n    - 1.5",
            "sweep.yaml:5: cell poison_rate=1.5: attack.poison_rate: input should be less than",
        ),
        (
            BASE + "grid:\n  pretrainning.epochs: [1]",
            'sweep.yaml:3: cell epochs=1: pretrainning: unknown key; did you mean "pretraining"?',
        ),
        (BASE + "grid:\n  seed.x: [1]", "sweep.yaml:3: cell x=1: seed.x: seed is 3, which has no keys inside it."),
        (BASE + "grid:\n  attack..x: [1]", "sweep.yaml:3: cell x=1: attack..x: give keys with single dots"),
        (
            BASE + "grid:\n  attack.epsilon: [0.1, 0.2]\n  pretraining.epochs: [2]\ncells:\n"
            "  - name: mine\n    set: {attack.epsilon: 0.2}",
            "sweep.yaml:4: cell epsilon=0.2-epochs=2 (seed 3) is the same experiment as cell mine (",
        ),
        (BASE + "seeds: [0, 0]", "sweep.yaml:2: cell base (seed 0) is the same experiment as cell base"),
        (
            BASE + "cells:\n  - name: a\n  - name: a\n    set: {seed: 1}",
            "sweep.yaml:4: cells.1.name: a is the name of an earlier cell",
        ),
        (BASE + "cells:\n  - name: a\n    set: {controls: [clean]}", "sweep.yaml:4: cell a: controls: a cell is one"),
        ("base: missing.yaml\nseeds: [0]", "sweep.yaml:1: base: "),
        ("base: 3\nseeds: [0]", "sweep.yaml:1: base: 3 is neither a configuration's path nor a configuration."),
        ("base: {data: synthetic, attack: clean, sed: 1}\nseeds: [0]", "sweep.yaml:1: sed: unknown key"),
    ],
)
def test_a_mistake_is_one_line_with_the_place_that_is_to_blame(
    text: str, message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_sweep(file)
    assert str(error.value).startswith(f"{file.parent}/{message}")
    assert main(["sweep", str(file), "--store", str(file.parent / "store")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (file.parent / "store").exists()


def test_a_mistake_in_the_base_is_told_with_the_line_of_the_base(file: Path) -> None:
    (file.parent / "base.yaml").write_text("data: synthetic\nattack: clean\npretraining:\n  epochs: 0\n")
    file.write_text(BASE + "seeds: [0]")
    with pytest.raises(ConfigError, match=r"base\.yaml:4: pretraining\.epochs: input should be greater"):
        read_sweep(file)


def test_a_base_that_does_not_fit_a_cell_is_told_with_the_cell(file: Path) -> None:
    (file.parent / "base.yaml").write_text("data: synthetic\nattack:\n  name: clean\n  target_class: 1\n")
    file.write_text(BASE + "cells:\n  - name: a\n    set: {attack.name: blto, attack.epsilon: 0.1}")
    assert len(read_sweep(file).cells) == 1
    (file.parent / "base.yaml").write_text(
        "data: synthetic\nattack:\n  name: blto\n  target_class: 1\n  epsilon: 0.1\n"
    )
    file.write_text(BASE + "cells:\n  - name: a\n    set: {attack.name: clean}")
    with pytest.raises(ConfigError, match=r"base\.yaml:5: attack\.epsilon: unknown key; .* \(in cell a\)\.$"):
        read_sweep(file)


def test_a_grid_beyond_reason_is_refused_before_it_is_made(file: Path) -> None:
    values = list(range(1, 101))
    grid = {"pretraining.epochs": values, "pretraining.batch_size": values, "seed": values}
    file.write_text(dump_yaml({"base": "base.yaml", "grid": grid}))
    with pytest.raises(ConfigError, match="1000000 combinations; give at most 10000"):
        read_sweep(file)
