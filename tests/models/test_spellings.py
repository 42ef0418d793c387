"""The names of other libraries: which tensor each is, and how their nets compute otherwise."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import blto
from blto.audit.reading import read_suspect
from blto.errors import InputRefused
from blto.models.encoder import Encoder, build_encoder
from blto.models.foreign import import_encoder
from blto.models.spellings import EFFICIENTNET_PYTORCH, difference, spellings_of

Weights = dict[str, Tensor]
LITE = "timm/tf_efficientnet_lite0"
BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Of each stage of EfficientNet-B0 and Lite0."""
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def their_names(gated: bool = False) -> Iterator[str]:
    """EfficientNet-PyTorch's, in the order in which its files have them."""

    def norm(name: str) -> Iterator[str]:
        return (f"{name}.{part}" for part in NORM)

    yield "_conv_stem.weight"
    yield from norm("_bn0")
    for block in range(sum(BLOCKS)):
        at = f"_blocks.{block}"
        if block:
            yield f"{at}._expand_conv.weight"
            yield from norm(f"{at}._bn0")
        yield f"{at}._depthwise_conv.weight"
        yield from norm(f"{at}._bn1")
        if gated:
            yield from (f"{at}._se_{way}.{part}" for way in ("reduce", "expand") for part in ("weight", "bias"))
        yield f"{at}._project_conv.weight"
        yield from norm(f"{at}._bn2")
    yield "_conv_head.weight"
    yield from norm("_bn1")


@pytest.fixture(scope="module")
def lite() -> Encoder:
    """Weights with batch norms that differ from each other, so that none can be taken for another unseen."""
    encoder = build_encoder(LITE, seed=0)
    with torch.no_grad():
        for number, part in enumerate(encoder.modules()):
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                part.running_mean += 0.01 * (number % 7)
                part.weight.mul_(1 + 0.1 * (number % 5))
    return encoder.eval()


@pytest.fixture(scope="module")
def theirs(lite: Encoder) -> Weights:
    values = lite.backbone.state_dict().values()
    named = dict(zip(their_names(), values, strict=True))
    return {**named, "_fc.weight": torch.zeros(10, 1280), "_fc.bias": torch.zeros(10)}


def saved(path: Path, weights: Weights) -> Path:
    stream = io.BytesIO()
    torch.save(weights, stream, _use_new_zipfile_serialization=False)
    path.write_bytes(stream.getvalue())
    return path


def test_a_legacy_file_with_efficientnet_pytorch_s_names_is_the_same_function(
    tmp_path: Path, lite: Encoder, theirs: Weights
) -> None:
    found = import_encoder(saved(tmp_path / "l.pth", theirs), LITE)
    assert (found.format, found.place, found.spelling) == ("torch legacy", "the whole file", EFFICIENTNET_PYTORCH)
    assert (found.unexpected, found.others, found.differs) == (("_fc.bias", "_fc.weight"), (), "")
    with torch.no_grad():
        assert torch.equal(found.encoder(IMAGES), lite(IMAGES))
    below = {f"module.{name}": value for name, value in theirs.items()}
    assert import_encoder(saved(tmp_path / "m.pth", below), LITE).place == "module"


def test_what_is_missing_or_does_not_fit_is_refused(tmp_path: Path, theirs: Weights) -> None:
    def refusal(weights: Weights, arch: str = LITE) -> str:
        with pytest.raises(InputRefused) as error:
            import_encoder(saved(tmp_path / "l.pth", weights), arch)
        assert "\n" not in str(error.value)
        return str(error.value)

    without = {name: value for name, value in theirs.items() if name != "_blocks.3._bn1.bias"}
    what = "1 of 245 tensors of timm/tf_efficientnet_lite0 are missing at the whole file"
    assert f"{what} (blocks.2.0.bn2.bias)" in refusal(without)
    assert f"{what} (blocks.2.0.bn2.bias has shape (1,), not (144,))" in refusal(
        {**theirs, "_blocks.3._bn1.bias": torch.zeros(1)}
    )
    halves = {name: value for name, value in theirs.items() if not name.startswith("_blocks.1")}
    renamed = {name.replace("_blocks.1", "blocks.1"): value for name, value in theirs.items() if name not in halves}
    assert "are missing" in refusal({**halves, **renamed})
    assert "are missing" in refusal(theirs, "timm/mnasnet_small")


def test_names_with_gates_are_those_of_timm_in_the_same_order() -> None:
    with torch.device("meta"):
        own = list(timm.create_model("tf_efficientnet_b0", num_classes=0).state_dict())
    net = nn.Module()
    net.state_dict = lambda: dict.fromkeys(own)  # type: ignore[method-assign, assignment]  # names are all it is asked
    encoder = nn.Module()
    encoder.backbone = net
    respelled = spellings_of(encoder)[EFFICIENTNET_PYTORCH]  # type: ignore[arg-type]
    assert [respelled(name) for name in their_names(gated=True)] == own
    for name in ("_blocks.16._bn1.weight", "_blocks.01._bn1.weight", "_blocks.0._expand_conv.weight", "_fc.weight", ""):
        assert respelled(name) == name
    assert respelled("_blocks.0._bn1.weight.weight") == "_blocks.0._bn1.weight.weight"


def test_an_architecture_that_pads_and_normalises_otherwise_is_said(
    tmp_path: Path, lite: Encoder, theirs: Weights
) -> None:
    file = saved(tmp_path / "l.pth", theirs)
    found = import_encoder(file, "timm/efficientnet_lite0")
    assert found.differs == (
        "timm/efficientnet_lite0 is not the function that these weights were trained in: it has a batch norm eps of "
        "1e-05 in place of 0.001 and strided convolutions (5) that pad all sides alike, where TensorFlow's do not. "
        "Give timm/tf_efficientnet_lite0 instead."
    )
    with torch.no_grad():
        assert not torch.allclose(found.encoder(IMAGES), lite(IMAGES), atol=1e-2)
    with pytest.warns(UserWarning, match=r"l\.pth: timm/efficientnet_lite0 is not the function") as warned:
        blto.load_encoder(file, "timm/efficientnet_lite0")
    assert warned[0].filename == __file__
    other, right = (read_suspect(file, arch, {}) for arch in ("timm/efficientnet_lite0", LITE))
    assert other.identity != right.identity, "what was seen in the one is not kept for the other"
    notes, same = other.notes, right.notes
    assert notes[:2] == (
        f"Read as timm/efficientnet_lite0 from the whole file, its tensors named {EFFICIENTNET_PYTORCH}.",
        found.differs,
    )
    assert same[0] == notes[0].replace("timm/", "timm/tf_")
    assert "2 further tensors there are no part of it and were left out (first: _fc.bias)." in same
    assert not any("function" in note for note in same)


def test_only_what_differs_is_said(lite: Encoder) -> None:
    own = difference("as they are", lite, "timm/efficientnet_lite0")
    assert own == difference(EFFICIENTNET_PYTORCH, lite, LITE) == ""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-2))
    said = difference(EFFICIENTNET_PYTORCH, Encoder(plain), "some net")
    assert said.endswith("it has a batch norm eps of 0.01 in place of 0.001.")
    strided = Encoder(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4, eps=1e-3)))
    said = difference(EFFICIENTNET_PYTORCH, strided, "timm/no_such_net")
    assert said.endswith("strided convolutions (1) that pad all sides alike, where TensorFlow's do not.")


def test_a_net_that_is_what_it_says_is_loaded_without_a_word(tmp_path: Path, theirs: Weights) -> None:
    blto.load_encoder(saved(tmp_path / "l.pth", theirs), LITE)  # a warning would be an error here
