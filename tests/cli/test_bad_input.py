"""Every mistake a user can make in a configuration: one line, exit 2, the key, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import blto
from blto.cli import main
from blto.data import cifar
from blto.errors import ConfigError
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
        ({"probes": {"lnear": {}}}, 'probes.lnear.name: unknown probe "lnear"; did you mean "linear"?'),
        ({"probes": {"knn": {"kk": 3}}}, 'probes.knn.kk: unknown key; did you mean "k"?'),
        ({"probes": {"knn": {"k": 0}}}, "probes.knn.k: input should be greater than or equal to 1"),
        ({"contrls": ["clean"]}, 'contrls: unknown key; did you mean "controls"? Known: attack, attacker_share, cont'),
        ({"controls": "clean"}, "controls: clean is not a list; give names of attacks, such as [clean]"),
        ({"controls": [3]}, "controls.0: 3 is neither an attack's name nor a mapping with a name"),
        ({"controls": ["clean", "cleen"]}, 'controls.1.name: unknown attack "cleen"; did you mean "clean"?'),
        (
            {"controls": [{"name": "untrained_generator", "epsilonn": 0.1}]},
            'controls.0.epsilonn: unknown key; did you mean "epsilon"?',
        ),
        (
            {"controls": [{"name": "blto", "bilevel": {"round": 1}}]},
            'controls.0.bilevel.round: unknown key; did you mean "rounds"?',
        ),
        ({"pretraining": {"backbone": "timm/no_such_net"}}, "pretraining.backbone.name: unknown timm model"),
        (
            {"pretraining": {"backbone": "torchvision/resnet81"}},
            'pretraining.backbone.name: unknown torchvision model "resnet81"; did you mean "resnet18"?',
        ),
        ({"pretraining": {"views": "simclr_sifar"}}, "pretraining.views.name: unknown view recipe"),
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
        ("attack.name=bltoo", '--set attack.name: unknown attack "bltoo"; did you mean "blto"?'),
        ("attack=bltoo", '--set attack.name: unknown attack "bltoo"; did you mean "blto"?'),
        ("pretraining.views.name=x", "--set pretraining.views.name: unknown view recipe"),
        ("controls=[cleen]", '--set controls.0.name: unknown attack "cleen"; did you mean "clean"?'),
        ("controls=[{name: clean, k: 1}]", "--set controls.0.k: unknown key"),
        ("probes.knn.kk=1", '--set probes.knn.kk: unknown key; did you mean "k"?'),
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


def test_a_name_in_the_file_is_not_blamed_on_an_assignment_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    write(attack={"name": "bltoo", "target_class": 0})
    line = refused(capsys, "run", "a.yaml", "--set", "attack.poison_rate=0.01")
    assert "a.yaml:8: attack.name: unknown attack" in line


def test_the_line_of_a_control_is_that_of_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text(
        "data: synthetic\nattack:\n  name: clean\ncontrols:\n  - clean\n  - name: clean\n    poison: 1\n"
    )
    assert "a.yaml:7: controls.1.poison: unknown key" in refused(capsys, "run", "a.yaml")


def test_a_wrong_seed_from_python_is_not_blamed_on_the_file() -> None:
    write()
    with pytest.raises(ConfigError, match=r"^--seed: input should be greater than or equal to 0"):
        blto.run("a.yaml", seed=-1)


UNTRAINED = {"name": "untrained_generator", "target_class": 0}


def surrogate(**changes: Any) -> dict[str, Any]:
    return {"attack": {**TINY_EXPERIMENT["attack"], "bilevel": changes}}


@pytest.mark.parametrize(
    ("changes", "commands", "expected"),
    [
        ({"attack": {**UNTRAINED, "target_class": 10}}, "run craft", "0 to 9"),
        ({"attack": {**UNTRAINED, "poison_rate": 0.2}}, "run craft", "asks for 24 images"),
        (
            {"attack": {**UNTRAINED, "epsilon": 0.9 / 255}},
            "run craft",
            "attack.epsilon is 0.00352941, less than one 8-bit step, so no image would change; give 1/255 to 1.",
        ),
        (surrogate(inner_poison_rate=0.2), "run craft", "asks for 24 images"),
        (
            {"attack": {"name": "ctrl", "target_class": 0, "poison_rate": 0.05}},
            "run craft",
            "attack.window is 32, but images of synthetic have 16 pixels a side; give a divisor of 16",
        ),
        (
            {"attack": {"name": "ctrl", "target_class": 0, "window": 8, "positions": [3, 8]}},
            "run craft",
            "attack.positions are 3, 8, and a window has 8 coefficients a side; give different numbers from 0 to 7.",
        ),
        (
            {"attack": {"name": "ssl_backdoor", "target_class": 0, "poison_rate": 0.05, "patch_size": 17}},
            "run craft",
            "attack.patch_size is 17, larger than the images of synthetic, which have 16 pixels a side; give 1 to 16.",
        ),
        ({"controls": [{"name": "untrained_generator", "target_class": 10}]}, "run", "0 to 9"),
        ({"controls": ["clean", {**UNTRAINED, "poison_rate": 0.2}]}, "run", "asks for 24 images"),
        (
            {"pretraining": {"batch_size": 121}},
            "run pretrain",
            "pretraining.batch_size is 121, but there are 120 training images",
        ),
        (
            {"pretraining": {"backbone": "torchvision/maxvit_t", "batch_size": 16}},
            "run pretrain",
            "pretraining.backbone: torchvision/maxvit_t cannot be used on images of 16 pixels",
        ),
        (
            surrogate(surrogate={"backbone": "timm/vit_tiny_patch16_224"}),
            "run craft",
            "attack.bilevel.surrogate.backbone: timm/vit_tiny_patch16_224 cannot be used on images of 16 pixels",
        ),
    ],
)
def test_what_only_the_data_can_refute_is_found_before_anything_is_written(
    changes: dict[str, Any], commands: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(**changes)
    for command in commands.split():
        assert expected in refused(capsys, command, "a.yaml", "--quiet")
        assert sorted(path.name for path in Path().iterdir()) == ["a.yaml"]


def test_one_step_of_8_bits_is_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    write(attack={"name": "untrained_generator", "target_class": 0, "poison_rate": 0.05, "epsilon": "1/255"})
    assert main(["craft", "a.yaml", "--quiet"]) == 0


@pytest.mark.parametrize("command", ["run", "craft", "pretrain", "evaluate", "poison", "demo"])
def test_a_gpu_that_is_not_there_is_the_only_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write()
    more = {"evaluate": ["--encoder", "e", "--clean-twin", "e", "--trigger", "t"], "poison": ["--out", "p"]}
    given = [] if command == "demo" else ["a.yaml"]
    line = refused(capsys, command, *given, *more.get(command, []), "--device", "cuda")
    assert 'device "cuda" was asked for, but torch finds no GPU' in line
    assert sorted(path.name for path in Path().iterdir()) == ["a.yaml"]


@pytest.mark.parametrize("command", ["run", "craft", "pretrain", "poison", "demo"])
def test_an_unknown_engine_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    given = {"demo": [], "poison": ["a.yaml", "--out", "p"]}.get(command, ["a.yaml"])
    line = refused(capsys, command, *given, "--engine", "fats")
    assert "'--engine': 'fats' is not one of 'fast', 'reference'" in line
    assert sorted(path.name for path in Path().iterdir()) == ["a.yaml"]


def test_an_unknown_engine_from_python_is_named() -> None:
    with pytest.raises(ConfigError, match="engine: input should be 'fast' or 'reference'"):
        blto.run(TINY_EXPERIMENT, engine="fats")  # type: ignore[arg-type]
    assert not list(Path().iterdir())


def test_a_data_set_that_is_not_there_is_one_line_with_the_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both the folder and the reason are long, and the line is cut."""

    def unreachable(url: str, path: Path, **_: object) -> None:
        raise ConfigError(f"{url}: cannot be downloaded.", code="NO-DATA") from OSError(
            "no network, " + 20 * "really, "
        )

    monkeypatch.setattr(cifar, "download", unreachable)
    monkeypatch.setenv("BLTO_CACHE", "cache")
    root = Path("a" * 200)
    root.mkdir()
    write(data="cifar10")
    line = refused(capsys, "run", "a.yaml", "--quiet", "--data-root", str(root))
    assert line.startswith("blto: error[NO-DATA]: cifar10: not in aaa")
    assert "Name the folder that holds " in line
    assert line.endswith("with --data-root or BLTO_DATA.")
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["run", "craft", "pretrain"])
def test_a_poisoned_set_is_refused_with_advice_that_the_command_can_follow(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("set") / "train" / "cat"
    folder.mkdir(parents=True)
    Path("set/POISONED.json").write_text("{}")
    write(data={"name": "image_folder", "path": "set", "image_size": 16})
    line = refused(capsys, command, "a.yaml", "--quiet", code=6)
    assert "POISONED.json" in line
    assert "only `blto pretrain --poisoned` (in Python poisoned=True) takes a poisoned one." in line
    assert not Path("runs").exists()


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
