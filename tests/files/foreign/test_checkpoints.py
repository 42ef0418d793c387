"""Checkpoints of others: what torch wrote comes back exactly, and what is not that is refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from blto.errors import InputRefused
from blto.files.foreign import groups, zipped
from blto.files.foreign.checkpoints import read_checkpoint
from tests.files.damage import mutants
from tests.files.foreign.made import contents, in_zip, read, refusal, saved, tensor_program, training


def at(value: Any, place: str) -> Any:
    for key in place.split(".") if place else ():
        value = value[int(key)] if key.isdecimal() else value[key]
    return value


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_wrote_comes_back(tmp_path: Path, legacy: bool) -> None:
    value = training()
    found = read(tmp_path, saved(value, legacy=legacy))
    assert found.format == ("torch legacy" if legacy else "torch zip")
    assert set(found.groups) == {"", "state_dict", "optimizer.state.0", "optimizer.state.1", "optimizer.state.2"}
    for group in found.groups:
        for name, array in found.arrays(group).items():
            tensor = at(value, group)[name].detach()
            expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            assert array.tobytes() == expected.contiguous().numpy().tobytes(), name
            assert torch.from_numpy(array).dtype == expected.dtype
            assert found.groups[group][name] == tuple(tensor.shape)
            assert array.flags.writeable


def test_safetensors_are_one_group(tmp_path: Path) -> None:
    found = read(tmp_path, save_safetensors({"a.weight": torch.ones(2, 3), "b": torch.zeros(1).bfloat16()}))
    assert (found.format, found.groups, found.layers) == ("safetensors", {"": {"a.weight": (2, 3), "b": (1,)}}, ())
    assert found.arrays("")["a.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_tensor_stays_inside_its_bytes(tmp_path: Path) -> None:
    assert read(tmp_path, in_zip(tensor_program(0, (4, 4), (4, 1)))).arrays("")["w"].shape == (4, 4)
    for wrong in (
        (0, (4, 5), (4, 1)),  # one row too long
        (1, (16,), (1,)),
        (0, (2, 8), (9, 1)),
        (0, (10**6, 10**6), (0, 0)),  # a few bytes as 10^12 numbers
        (0, (17,), (0,)),
        (-1, (4,), (1,)),
        (0, (-4,), (1,)),
        (0, (4,), (-1,)),
        (0, (4, 4), (1,)),
        (2**50, (1,), (1,)),
        (0, (2**40, 2**40, 0), (0, 0, 0)),  # nothing, in a shape that no array can have
    ):
        assert "a tensor" in refusal(tmp_path, in_zip(tensor_program(*wrong)))
    assert "missing or cut short" in refusal(tmp_path, in_zip(tensor_program(0, (17,), (1,), numel=17)))
    assert "missing or cut short" in refusal(tmp_path, in_zip(tensor_program(0, (1,), (1,), key="1")))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_would_be_other_weights_in_torch_is_refused(tmp_path: Path, legacy: bool) -> None:
    negated = torch.complex(torch.ones(2), torch.ones(2)).conj().imag
    assert negated.is_neg()
    assert "a negated or conjugated tensor" in refusal(tmp_path, saved({"a": negated}, legacy=legacy))
    twice = {0: torch.ones(1), "0": torch.zeros(1)}
    assert "two entries of one name" in refusal(tmp_path, saved(twice, legacy=legacy))
    nested = {"a.b": {"w": torch.ones(1)}, "a": {"b": {"w": torch.zeros(1)}}}
    assert "two mappings of one name" in refusal(tmp_path, saved(nested, legacy=legacy))


def test_one_storage_has_one_type(tmp_path: Path) -> None:
    one = tensor_program(0, (4,), (1,))
    other = one[3:-2].replace(b"FloatStorage", b"IntStorage").replace(b"X\x01\x00\x00\x00w", b"X\x01\x00\x00\x00v")
    assert "one storage in two forms" in refusal(tmp_path, in_zip(one[:-2] + b"s" + other + b"s."))


def test_what_trainings_keep_beside_weights_is_passed_over(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters())
    kept = {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "rng": torch.get_rng_state(),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("abc"),
        "when": datetime.timedelta(seconds=1),
        "array": np.arange(3),
        "kinds": [np.float32(1), torch.complex64, 3 + 4j],
        "by": {(1, 2): "tuple", None: "none", 0.5: "half", True: "true"},
        "path": Path("/tmp"),
        "simple": types.SimpleNamespace(a=1),
    }
    for protocol in (2, 3, 4, 5):
        found = read(tmp_path, saved({"state_dict": network.state_dict(), **kept}, pickle_protocol=protocol))
        assert found.groups["state_dict"] == {"weight": (2, 2), "bias": (2,)}, protocol


def test_omegaconf_is_passed_over(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"lr": 0.1, "sizes": [1, {"a": None}]})
    assert "w" in read(tmp_path, saved({"w": torch.ones(1), "config": config})).groups[""]


def test_the_mappings_of_python_2_are_read(tmp_path: Path) -> None:
    tensor = tensor_program(0, (4,), (1,))[3:-2]
    program = b"\x80\x02ccollections\nOrderedDict\n](]" + tensor[:6] + b"a" + tensor[6:] + b"aea\x85R."
    program = program.replace(b"aea\x85R.", b"ae\x85R.")
    assert read(tmp_path, in_zip(program)).groups == {"": {"w": (4,)}}


@pytest.mark.parametrize("name", ["a" * length for length in range(1, 40)][::4])
def test_safetensors_are_told_by_their_header_not_by_its_length(tmp_path: Path, name: str) -> None:
    for pad in range(128, 1200, 128):
        head = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        data = pad.to_bytes(8, "little") + head.ljust(pad) + bytes(4)
        assert read(tmp_path, data).format == "safetensors"


def test_a_legacy_storage_has_the_size_that_it_says(tmp_path: Path) -> None:
    whole = saved({"a": torch.full((4,), 1.5)}, legacy=True)
    at = whole.index(np.full(4, 1.5, "<f4").tobytes()) - 8
    assert whole[at : at + 8] == (4).to_bytes(8, "little")
    wrong = whole[:at] + (3).to_bytes(8, "little") + whole[at + 8 :]
    assert "a storage of another size than it says" in refusal(tmp_path, wrong)


def test_a_flipped_bit_in_a_weight_is_seen(tmp_path: Path) -> None:
    data = bytearray(saved({"a": torch.full((64,), 1.5)}))
    place = data.find(np.full(8, 1.5, "<f4").tobytes()) + 40
    data[place] ^= 1
    assert "damaged (the checksum of data/0 does not match)" in refusal(tmp_path, bytes(data))


def test_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved({str(number): torch.ones(number + 1) for number in range(9)})
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(InputRefused, match="larger than the limit of 100 bytes"):
        read_checkpoint(tmp_path / "c.pt", max_bytes=100)
    with monkeypatch.context() as patched:
        patched.setattr(groups, "MAX_TENSORS", 8)
        assert "more tensors than weights are" in refusal(tmp_path, data)
    monkeypatch.setattr(zipped, "MAX_INDEX_BYTES", 10)
    assert "its index is larger than 10 bytes" in refusal(tmp_path, data)


def small(kind: str) -> bytes:
    value = {"state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}, "epoch": 1}
    if kind == "safetensors":
        return bytes(save_safetensors({"a": torch.arange(6.0)}, {"x": "y"}))
    return saved(value, legacy=kind == "legacy")


@pytest.mark.parametrize(
    ("kind", "count"),
    [("zip", 1000), ("safetensors", 1000), ("legacy", 14)]
    + [pytest.param(kind, 10_000, marks=pytest.mark.full) for kind in ("zip", "safetensors")]
    + [pytest.param("legacy", 350, marks=pytest.mark.full)],
)
def test_a_damaged_file_is_refused_or_gives_what_it_held(tmp_path: Path, kind: str, count: int) -> None:
    whole = small(kind)
    held = {name: array for array_of in contents(read(tmp_path, whole)) for name, array in array_of.items()}
    refused = 0
    for mutant in mutants(whole, count):
        try:
            found = contents(read(tmp_path, mutant))
        except InputRefused:
            refused += 1
            continue
        if kind != "zip":  # without a checksum only the structure can be checked
            continue
        for name, array in ((name, array) for group in found for name, array in group.items()):
            np.testing.assert_array_equal(array, held[name])  # its name, in the file's index, has a checksum too
    assert refused > count / 2
