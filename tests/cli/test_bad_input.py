"""Every mistake a user can make in a configuration: one line, exit 2, the key, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blto.cli import main
from blto.experiment import ExperimentSpec
from blto.files.yaml import dump_yaml
from blto.records import RunStore
from tests.tiny_experiment import TINY_EXPERIMENT


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BLTO_DATA", raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line of a refused command."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert len(captured.err) <= 301
    return captured.err.rstrip("\n")


def write(**changes: Any) -> None:
    Path("a.yaml").write_text(dump_yaml({**TINY_EXPERIMENT, **changes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attak": 1}, 'attak: unknown key; did you mean "attack"?'),
        ({"attack": {"name": "bltoo", "target_class": 0}}, 'unknown attack "bltoo"; did you mean "blto"?'),
        (
            {"attack": {"name": "blto", "target_class": 0, "bilevel": {"round": 1}}},
            'bilevel.round: unknown key; did you mean "rounds"?',
        ),
        ({"pretraining": {"epoch": 1}}, 'pretraining.epoch: unknown key; did you mean "epochs"?'),
        ({"pretraining": {"epochs": "many"}}, "pretraining.epochs: input should be a valid integer"),
        (
            {"pretraining": {"method": {"name": "simclr", "temprature": 1}}},
            'temprature: unknown key; did you mean "temperature"?',
        ),
        ({"attack": {"name": "blto", "target_class": 0, "epsilon": 0}}, "epsilon: input should be greater than 0"),
        (
            {"attack": {"name": "blto", "target_class": 0, "epsilon": 1.5}},
            "epsilon: input should be less than or equal to 1",
        ),
        ({"attack": {"name": "blto", "target_class": 0, "poison_rate": 1.0001}}, "poison_rate: input should be less"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"seed": True}, "seed: input should be"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_file_and_line(
    changes: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(**changes)
    line = refused(capsys, "run", "a.yaml")
    assert line.startswith("blto: error[CONFIG]: a.yaml:")
    assert line.removeprefix("blto: error[CONFIG]: a.yaml:").split(":")[0].isdigit()
    assert expected in line
    assert sorted(path.name for path in Path().iterdir()) == ["a.yaml"], "nothing may be written"


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("attack.poison_rate=1.5", "--set attack.poison_rate: input should be less than or equal to 1"),
        ("attack.poison_rte=0.1", '--set attack.poison_rte: unknown key; did you mean "poison_rate"?'),
        ("seed=1.5", "--set seed: input should be a valid integer"),
        ("pretraining.epochs.x=1", "pretraining.epochs is 2, which has no keys inside it"),
        ("seed=!!python/name:os.system", "--set seed: tags (!) are not accepted"),
    ],
)
def test_a_wrong_assignment_is_not_blamed_on_the_file(
    assignment: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    line = refused(capsys, "run", "a.yaml", "--set", assignment)
    assert expected in line
    assert "a.yaml" not in line
    assert sorted(path.name for path in Path().iterdir()) == ["a.yaml"]


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ({"target_class": 10}, "0 to 9"),
        ({"target_class": 0, "poison_rate": 0.2}, "asks for 24 images"),
    ],
)
def test_what_only_the_data_can_refute_is_found_before_anything_is_written(
    attack: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(attack={"name": "untrained_generator", **attack})
    assert expected in refused(capsys, "run", "a.yaml", "--quiet")
    assert sorted(path.name for path in Path().iterdir()) == ["a.yaml"]


def test_a_missing_configuration_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.yaml" in refused(capsys, "run", "absent.yaml")


def test_a_run_that_another_process_is_making_is_busy(capsys: pytest.CaptureFixture[str]) -> None:
    write()
    store = RunStore(Path("runs"))
    with store.lock(store.run_id(ExperimentSpec.parse(TINY_EXPERIMENT).model_dump(mode="json"))):
        line = refused(capsys, "run", "a.yaml", "--quiet", code=5)
    assert "in use by pid" in line


def test_a_store_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    write()
    Path("runs").write_text("a file, not a folder")
    assert "runs" in refused(capsys, "run", "a.yaml", "--quiet", code=4)


def test_a_report_of_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "report", "runs/nothing", code=3)
    assert line.startswith("blto: error[INPUT-REFUSED]: ")
    assert "no such record" in line
    assert not Path("runs").exists()
