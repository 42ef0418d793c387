"""Commands that need no training, and how the command line refuses what it does not know."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import blto
from blto.catalog import registries
from blto.cli import main


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: blto" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lsit"], "No such command 'lsit'. Did you mean 'list'?"),
        (["show"], "Missing argument 'name'. See `blto show --help`."),
        (["show", "blto", "--colour"], "No such option: --colour"),
        (["show", "simclrr"], 'unknown component "simclrr"; did you mean "simclr"?'),
        (["show", "attck:blto"], 'unknown kind "attck"; did you mean "attack"?'),
        (["list", "attacks"], 'unknown kind "attacks"; did you mean "attack"?'),
    ],
)
def test_what_is_not_known_is_one_line_and_exit_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("blto: error[")
    assert expected in captured.err
    assert captured.err.count("\n") == 1


def test_list_as_text_and_as_json_name_the_same_components(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert {"blto", "clean"} <= set(listing["attack"])
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    named = {(line.split()[0], line.split()[1]) for line in lines if not line.startswith(" ")}  # the rest of a long row
    assert named == {(kind, name) for kind, cards in listing.items() for name in cards}


def test_list_can_be_narrowed_to_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "method", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"method"}


def test_show_names_every_option_with_range_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "blto", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == blto.show("blto")
    options = {option["key"]: option for option in shown["options"]}
    assert options["target_class"]["required"]
    assert options["epsilon"]["default"] == pytest.approx(8 / 255)
    assert options["bilevel.rounds"]["accepts"] == "integer >= 1"
    assert options["bilevel.surrogate.method"]["default"]["name"] == "simsiam", "the default here, not the class's own"
    assert all(
        option["meaning"] for key, option in options.items() if key.startswith("bilevel.") and key.count(".") == 1
    )
    assert main(["show", "blto"]) == 0
    text = capsys.readouterr().out
    assert "arXiv 2404.07863" in text
    assert all(key in text for key in options)


def components() -> list[str]:
    return [f"{kind}:{name}" for kind, registry in registries().items() for name in registry.names()]


@pytest.mark.parametrize("name", components())
def test_every_option_has_a_meaning_that_is_shown_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = blto.show(name)["options"]
    assert not [option["key"] for option in options if not option["meaning"]]
    assert not [option for option in options if re.search("as in (every attack|BLTO)", option["meaning"])]
    assert main(["show", name]) == 0
    shown = set(capsys.readouterr().out.split())
    assert not {word for option in options for word in option["meaning"].split()} - shown


def test_a_meaning_given_elsewhere_is_spelled_out() -> None:
    for name in ("blto", "untrained_generator", "frozen_surrogate"):
        meanings = {option["key"]: option["meaning"] for option in blto.show(name)["options"]}
        assert meanings["target_class"].startswith("the class that triggered images shall be taken for")
        assert meanings["poison_rate"].startswith("poisoned images / all training images, in [0, 1]")
    assert meanings["epsilon"] == "L-infinity budget, a fraction of the pixel range (paper: 8/255)."
    assert "options of the bi-level loop; the surrogate trains for one period" in meanings["bilevel"]


def test_show_finds_library_backbones_and_kinds() -> None:
    assert blto.show("backbone:resnet18")["kind"] == "backbone"
    assert blto.show("generator:resnet")["kind"] == "generator"
    assert blto.show("torchvision/resnet18")["kind"] == "backbone"
