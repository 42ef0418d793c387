"""Configuration files: what is read, what is refused, and how the refusal names file, line and key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blto.errors import ConfigError
from blto.files.yaml import apply_assignments, dump_yaml, load_yaml, parse_assignment, with_position


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("010", 10),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("8/255", 8 / 255),
        ("-1/4", -0.25),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("timm/resnet18", "timm/resnet18"),
        ("'8/255'", "8/255"),
        ('"1"', "1"),
        ("[1, 8/255, a]", [1, 8 / 255, "a"]),
        ("{name: blto, epsilon: 8/255}", {"name": "blto", "epsilon": 8 / 255}),
    ],
)
def test_values_mean_the_same_in_a_file_and_after_set(tmp_path: Path, text: str, value: Any) -> None:
    read = load_yaml(write(tmp_path, f"key: {text}\n"))["key"]
    assert read == value
    assert type(read) is type(value)
    assert parse_assignment(f"a.key={text}") == (("a", "key"), value)


def test_an_empty_file_is_an_empty_configuration(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "# nothing yet\n")) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nattack:\n  epsilon: 1\n  epsilon: 2\n", "run.yaml:4: attack.epsilon: given twice"),
        ("seed: .nan\n", "run.yaml:1: seed: .nan is not a finite number"),
        ("a:\n  - 1\n  - -.inf\n", "run.yaml:3: a.1: -.inf is not a finite number"),
        ("a: 1e999\n", "run.yaml:1: a: 1e999 is not a finite number"),
        ("a: 1/0\n", "run.yaml:1: a: 1/0 divides by zero"),
        ("a: !!python/object/apply:os.system [id]\n", "run.yaml:1: tags (!) are not accepted"),
        ("a: &x [1]\nb: 2\n", "run.yaml:1: anchors and aliases"),
        ("a: 1\nb: *x\n", "run.yaml:2: anchors and aliases"),
        ("[1, 2]\n", "run.yaml:1: expected `key: value` pairs"),
        ("? [a]\n: 1\n", "run.yaml:1: a key is plain text"),
        ("<<: {a: 1}\n", "run.yaml:1: a key is plain text"),
        ("a: [1\nb: 2\n", "run.yaml:2: not YAML"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not YAML"),
        ("[" * 20_000, "run.yaml:1: nested deeper than 32 levels"),
        (b"seed: 1\nname: \xff\n", "run.yaml:2: not UTF-8 text"),
        (b"a: \x00\n", "run.yaml: not YAML"),
        (b"a" * ((1 << 18) + 1), "larger than the limit of 262144 bytes"),
    ],
)
def test_refusals_name_file_line_and_key(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_pipe_or_a_missing_file_is_a_usage_error_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "absent.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_yaml(tmp_path / name)


def test_assignments_are_applied_in_order_to_a_copy() -> None:
    config = {"attack": {"name": "blto", "epsilon": 0.1}, "data": "cifar10"}
    result = apply_assignments(
        config, ["attack.epsilon=8/255", "data.size=100", "new.inner.key=1", "attack.epsilon=0.5"]
    )
    assert result == {
        "attack": {"name": "blto", "epsilon": 0.5},
        "data": {"name": "cifar10", "size": 100},
        "new": {"inner": {"key": 1}},
    }
    assert config == {"attack": {"name": "blto", "epsilon": 0.1}, "data": "cifar10"}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("attack", "--set attack: give key=value"),
        ("=1", "give key=value"),
        ("a..b=1", "give key=value"),
        ("seed.x=1", "seed is 3, which has no keys inside it"),
        ("a=[1", "--set a: not YAML"),
        ("a=nan", "--set a: nan is not a finite number"),
        ("a={b: 1, b: 2}", "--set a: b: given twice"),
        ("a\x1b[2J=!x 1", r"--set a\x1b[2J: tags"),
    ],
)
def test_bad_assignments_are_refused(assignment: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_assignments({"seed": 3}, [assignment])
    assert expected in str(caught.value)


def test_an_error_about_a_key_gets_the_line_of_that_key(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nattack:\n  name: blto\n  epsilon: 2\n")
    error = ConfigError("attack.epsilon: input should be at most 1 (given: 2).")
    assert str(with_position(error, path)) == f"{path}:4: attack.epsilon: input should be at most 1 (given: 2)."
    inside_default = ConfigError("attack.surrogate.depth: unknown key.")
    assert str(with_position(inside_default, path)) == f"{path}:2: attack.surrogate.depth: unknown key."
    elsewhere = ConfigError("probe: unknown key.")
    assert str(with_position(elsewhere, path)) == f"{path}: probe: unknown key."


texts = st.text() | st.sampled_from(
    ["8/255", "1e-3", "nan", ".inf", "no", "null", "true", "1", "", "~", "a: b", "*x", "010", "\x85", "a\u2028b"]
)
numbers = st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text("abc_", min_size=1), values, max_size=4))
def test_what_is_dumped_is_read_back(tmp_path: Path, value: dict[str, Any]) -> None:
    assert load_yaml(write(tmp_path, dump_yaml(value))) == value


def test_a_value_that_occurs_twice_is_written_out_twice(tmp_path: Path) -> None:
    shared = {"name": "resnet18"}
    value = {"victim": shared, "surrogate": shared}
    assert load_yaml(write(tmp_path, dump_yaml(value))) == value
