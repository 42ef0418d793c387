"""Encoders that others have trained: found under their usual names and the same function as theirs, or refused."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

import blto
from blto.errors import ConfigError, InputRefused
from blto.models.checkpoints import save_encoder
from blto.models.encoder import Encoder, build_encoder
from blto.models.foreign import Imported, import_encoder

Weights = dict[str, Tensor]
SMALL = {"name": "small_resnet", "width": 4}
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(network: nn.Module) -> nn.Module:
    """The network with batch norm that a training has moved."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            network.train()(torch.rand(8, 3, 32, 32))
    return network.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained(models.resnet18(weights=None))


@pytest.fixture(scope="module")
def cifar_resnet() -> nn.Module:
    """As solo-learn, MoCo on CIFAR and others change torchvision's: a 3x3 stem, no pooling after it."""
    network = models.resnet18(weights=None)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return trained(network)


def headless(network: Any, images: Tensor) -> Tensor:
    """What the network has below its classifier."""
    kept: list[Tensor] = []
    handle = network.avgpool.register_forward_hook(lambda module, inputs, output: kept.append(output.flatten(1)))
    with torch.no_grad():
        network(images)
    handle.remove()
    return kept[0]


def under(prefix: str, weights: Mapping[str, Tensor]) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def numbered(network: nn.Module) -> Weights:
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


def saved(path: Path, value: Any, **how: Any) -> Path:
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    path.write_bytes(stream.getvalue())
    return path


def checked(found: Imported, network: nn.Module) -> Imported:
    """The same, after its features were compared with the network's."""
    encoder = found.encoder
    with torch.no_grad():
        ours = encoder(IMAGES)
    assert not encoder.training
    assert torch.equal(ours, headless(network, (IMAGES - encoder.mean) / encoder.std))
    return found


def test_a_checkpoint_of_moco_gives_the_query_encoder(tmp_path: Path, resnet: nn.Module) -> None:
    other = {name: value.clone() for name, value in resnet.state_dict().items()}
    other["conv1.weight"] *= 2
    weights = under("module.encoder_k.", other) | under("module.encoder_q.", resnet.state_dict())
    file = saved(tmp_path / "m.pth.tar", {"epoch": 200, "state_dict": weights | {"module.queue": torch.rand(8, 16)}})
    found = checked(import_encoder(file, "torchvision/resnet18"), resnet)
    assert (found.place, found.format) == ("state_dict.module.encoder_q", "torch zip")
    assert found.unexpected == ("module.encoder_q.fc.bias", "module.encoder_q.fc.weight")
    assert found.others == ("state_dict.module.encoder_k",)
    again = import_encoder(file, "torchvision/resnet18", key_prefix="module.encoder_k.")
    assert (again.place, again.others) == ("state_dict.module.encoder_k", ())
    assert torch.equal(again.encoder.backbone.state_dict()["conv1.weight"], other["conv1.weight"])


def test_a_legacy_checkpoint_is_found_too(tmp_path: Path, resnet: nn.Module) -> None:
    file = saved(tmp_path / "m.pth", resnet.state_dict(), _use_new_zipfile_serialization=False)
    found = checked(import_encoder(file, "torchvision/resnet18"), resnet)
    assert (found.place, found.format) == ("the whole file", "torch legacy")
    assert "file size" in found.layers


def test_safetensors_are_found_too(tmp_path: Path, resnet: nn.Module) -> None:
    save_file(resnet.state_dict(), tmp_path / "m.safetensors")
    found = checked(import_encoder(tmp_path / "m.safetensors", "torchvision/resnet18"), resnet)
    assert (found.format, found.layers) == ("safetensors", ())


def test_lightning_s_checkpoint_of_a_numbered_net(tmp_path: Path, resnet: nn.Module) -> None:
    head = {"projection_head.layers.0.weight": torch.rand(4, 512)}
    file = saved(tmp_path / "m.ckpt", {"state_dict": under("backbone.", numbered(resnet)) | head, "epoch": 9})
    assert checked(import_encoder(file, "torchvision/resnet18"), resnet).place == "state_dict.backbone"


@pytest.mark.parametrize("form", ["named", "numbered"])
def test_torchvision_s_names_fit_our_own_resnet(tmp_path: Path, cifar_resnet: nn.Module, form: str) -> None:
    weights = numbered(cifar_resnet) if form == "numbered" else cifar_resnet.state_dict()
    checked(import_encoder(saved(tmp_path / "m.pt", under("net.", weights)), "resnet18"), cifar_resnet)


def test_half_precision_is_widened_and_counters_may_be_missing(tmp_path: Path, resnet: nn.Module) -> None:
    weights = {name: value.half() for name, value in resnet.state_dict().items() if value.is_floating_point()}
    encoder = import_encoder(saved(tmp_path / "m.pt", weights), "torchvision/resnet18").encoder
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    first, whole = (net.state_dict()["conv1.weight"] for net in (encoder.backbone, resnet))
    torch.testing.assert_close(first, whole, atol=1e-3, rtol=0)


def test_the_channels_of_the_training_can_be_given(tmp_path: Path, resnet: nn.Module) -> None:
    file = saved(tmp_path / "m.pt", resnet.state_dict())
    found = import_encoder(file, "torchvision/resnet18", mean=(0.5, 0.25, 0.125), std=(1.0, 2.0, 4.0))
    assert found.encoder.mean.flatten().tolist() == [0.5, 0.25, 0.125]
    checked(found, resnet)


def refusal(file: Path, arch: str = "torchvision/resnet18", **how: Any) -> InputRefused:
    with pytest.raises(InputRefused) as error:
        import_encoder(file, arch, **how)
    assert str(error.value).startswith(str(file))
    assert str(error.value).isprintable()
    return error.value


def test_another_architecture_is_refused_with_what_is_missing(tmp_path: Path, resnet: nn.Module) -> None:
    file = saved(tmp_path / "m.pt", {"state_dict": under("module.", resnet.state_dict())})
    error = refusal(file, "torchvision/resnet34")
    what = "80 of 180 tensors of torchvision/resnet34 are missing at state_dict.module (layer1.2.bn1.bias)"
    assert str(error) == f"{file}: {what}. Give another arch or key_prefix."
    assert "none of the 100 tensors of torchvision/resnet18 is in it" in str(refusal(file, key_prefix="nothing."))
    cifar = build_encoder("resnet18", seed=0).backbone.state_dict()
    cifar["stem.0.weight"] = torch.zeros(64, 3, 7, 7)
    shape = "(stem.0.weight has shape (64, 3, 7, 7), not (64, 3, 3, 3))"
    assert shape in str(refusal(saved(tmp_path / "c.pt", cifar), "resnet18"))
    with pytest.raises(ConfigError, match="unknown torchvision model"):
        import_encoder(file, "torchvision/resnet1")


def test_a_lightly_generator_s_numbers_are_not_taken_for_another_net(tmp_path: Path) -> None:
    """It has no ReLU behind its first layer: with these weights our net would be another function."""
    from lightly.models import ResNetGenerator

    layers = list(ResNetGenerator("resnet-18").children())[:-1]
    refusal(saved(tmp_path / "m.pt", nn.Sequential(*layers).state_dict()), "resnet18")


def test_of_several_nets_one_must_be_asked_for(tmp_path: Path, resnet: nn.Module) -> None:
    second = {name: value.clone() for name, value in resnet.state_dict().items()}
    second["conv1.weight"] *= 2
    file = saved(tmp_path / "m.pt", {"first": resnet.state_dict(), "second": second})
    assert "2 places in it fit (first, second); give one of them as key_prefix" in str(refusal(file))
    assert import_encoder(file, "torchvision/resnet18", key_prefix="second").place == "second"
    named = saved(tmp_path / "n.pt", {"nonlinear": second, "online_encoder": resnet.state_dict()})
    found = import_encoder(named, "torchvision/resnet18")
    assert (found.place, found.others) == ("online_encoder", ("nonlinear",))


def test_a_mixture_of_two_nets_is_none(tmp_path: Path, resnet: nn.Module) -> None:
    file = saved(tmp_path / "m.pt", {"a": numbered(resnet), "a.b": {"bn1.bias": torch.zeros(64)}})
    assert import_encoder(file, "torchvision/resnet18").place == "a"
    named = {name: value for name, value in resnet.state_dict().items() if name.startswith("layer")}
    half = {name: value for name, value in numbered(resnet).items() if name[0] in "01"}
    refusal(saved(tmp_path / "h.pt", named | half))


def test_two_tensors_of_one_name_are_no_net(tmp_path: Path, cifar_resnet: nn.Module) -> None:
    second = {"layer2.0.shortcut.0.weight": torch.zeros(128, 64, 1, 1)}
    whole = cifar_resnet.state_dict()
    assert import_encoder(saved(tmp_path / "m.pt", whole), "resnet18").place == "the whole file"
    refusal(saved(tmp_path / "m.pt", whole | second), "resnet18")


def test_another_kind_of_numbers_is_refused(tmp_path: Path, resnet: nn.Module) -> None:
    weights = {name: value.to(torch.int8) for name, value in resnet.state_dict().items()}
    assert "holds int8, where the architecture has torch.float32" in str(refusal(saved(tmp_path / "m.pt", weights)))


def test_features_that_are_no_numbers_are_refused(tmp_path: Path, resnet: nn.Module) -> None:
    weights = dict(resnet.state_dict())
    weights["layer2.0.bn1.running_var"] = torch.full((128,), -1.0)
    error = refusal(saved(tmp_path / "m.pt", weights))
    assert error.code == "CKPT-NAN"
    assert "its features of two images of noise hold NaN or Inf" in str(error)


def test_what_cannot_be_built_is_told_before_the_file_is_read(tmp_path: Path) -> None:
    nowhere = tmp_path / "nothing.pt"
    with pytest.raises(ConfigError, match=r"timm/vit_tiny_patch16_224 does not take images of 32 pixels .*image_size"):
        import_encoder(nowhere, "timm/vit_tiny_patch16_224")
    for wrong in ({"mean": (1.0, 2.0)}, {"std": (0.0, 1.0, 1.0)}, {"mean": (float("nan"), 0.0, 0.0)}):
        with pytest.raises(ConfigError, match="give three numbers, one a channel, of std above 0"):
            import_encoder(nowhere, "resnet18", **wrong)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, wrong: float, resnet: nn.Module) -> None:
    weights = dict(resnet.state_dict())
    weights["layer2.0.bn1.running_var"] = torch.full((128,), wrong)
    error = refusal(saved(tmp_path / "m.pt", weights))
    assert error.code == "CKPT-NAN"
    assert "1 of 120 tensors hold NaN or Inf (first: layer2.0.bn1.running_var)" in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=40), max_size=8, unique=True), st.text(max_size=20))
def test_hostile_names_are_never_obeyed_and_never_shown_raw(tmp_path: Path, names: list[str], prefix: str) -> None:
    encoder = build_encoder(SMALL, seed=0)
    weights = under(f"{prefix}.", encoder.backbone.state_dict()) | {name: torch.ones(2) for name in names}
    found = import_encoder(saved(tmp_path / "m.pt", weights), SMALL)
    assert torch.equal(found.encoder(IMAGES), encoder.eval()(IMAGES))
    refusal(saved(tmp_path / "m.pt", {name: torch.ones(2) for name in names} or {"a": torch.ones(1)}))


def test_the_call_of_the_package_reads_both_kinds(tmp_path: Path, resnet: nn.Module) -> None:
    own = build_encoder(SMALL, seed=0).eval()
    save_encoder(tmp_path / "e.safetensors", own, SMALL, 32)
    assert isinstance(blto.load_encoder(tmp_path / "e.safetensors"), Encoder)
    file = saved(tmp_path / "m.pt", resnet.state_dict())
    found = blto.load_encoder(file, "torchvision/resnet18", image_size=64)
    assert torch.equal(found.backbone.state_dict()["conv1.weight"], resnet.state_dict()["conv1.weight"])
    with pytest.raises(ConfigError, match="image_size: only for an encoder that others have trained; give arch"):
        blto.load_encoder(tmp_path / "e.safetensors", image_size=64)
