"""What "auto" means on machines that this one is not: the processor's capabilities are patched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blto.errors import ConfigError
from blto.models.native import resnet
from blto.pretraining import trainer
from blto.pretraining.spec import RecipeSpec
from blto.pretraining.trainer import training_precision
from blto.runtime import device as devices
from blto.runtime.device import native_bf16, processor_name, resolve_device, resolve_precision


def on_a_processor_with(patch: pytest.MonkeyPatch, *capabilities: str) -> None:
    patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **dict.fromkeys(capabilities, True)})


def on_a_gpu(patch: pytest.MonkeyPatch, *, bf16: bool) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return bf16 or including_emulation  # torch emulates bf16 on every GPU, slowly

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [((), False), (("avx512_f", "amx_tile"), False), (("amx_bf16",), True), (("avx512_bf16",), True)],
)
def test_bf16_is_native_with_amx_or_avx512_bf16(
    capabilities: tuple[str, ...], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_processor_with(monkeypatch, *capabilities)
    assert native_bf16("cpu") is native
    assert resolve_precision("auto", "cpu") == ("bf16" if native else "fp32")


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_that_a_gpu_only_emulates_is_not_native(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with(monkeypatch)
    on_a_gpu(monkeypatch, bf16=bf16)
    assert resolve_precision("auto", "cuda") == ("bf16" if bf16 else "fp32")


@pytest.mark.parametrize("capabilities", [(), ("amx_bf16",)])
def test_a_precision_that_was_given_stays(capabilities: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with(monkeypatch, *capabilities)
    assert resolve_precision("fp32", "cpu") == "fp32"
    assert resolve_precision("bf16", "cpu") == "bf16"


def test_the_reference_engine_means_fp32_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with(monkeypatch, "amx_bf16")
    assert training_precision("auto", "fast", "cpu") == "bf16"
    assert training_precision("auto", "reference", "cpu") == "fp32"
    assert training_precision("bf16", "reference", "cpu") == "bf16"


@pytest.mark.parametrize(
    ("changes", "library", "expected"),
    [
        ({}, object(), "the kernels"),
        ({}, None, "the reason"),
        ({"precision": "fp32"}, object(), "plain torch"),
        ({"engine": "reference", "precision": "bf16"}, object(), "plain torch"),
        ({"backbone": {"name": "small_resnet", "width": 20}}, object(), "plain torch: the AMX kernels do not fit"),
        ({"batch_size": 40}, object(), "plain torch: the AMX kernels do not fit"),
    ],
)
def test_the_engine_is_named_by_what_it_comes_to(
    changes: dict[str, object], library: object | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_processor_with(monkeypatch, "amx_bf16")
    for module in (trainer, resnet):
        found = library, "the kernels" if library else "the reason"
        monkeypatch.setattr(module, "find_kernels", lambda found=found: found)
    given = {"backbone": {"name": "small_resnet", "width": 32}, "batch_size": 64, "precision": "auto"}
    recipe = RecipeSpec.model_validate({**given, **changes})
    facts = trainer.arithmetic(recipe, "cpu", 32)
    assert facts["engine"].startswith(expected)
    assert facts["device"] == "cpu"
    assert facts["precision"] == trainer.training_precision(recipe.precision, recipe.engine, "cpu")
    assert facts["processor"] == processor_name("cpu")


def test_a_processor_that_is_left_to_fp32_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with(monkeypatch)
    monkeypatch.setattr(trainer, "find_kernels", lambda: (None, "the reason"))
    facts = trainer.arithmetic(RecipeSpec.model_validate({"backbone": "small_resnet"}), "cpu", 32)
    assert (facts["precision"], facts["engine"]) == ("fp32", "the reason")


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match='give "auto", "cpu" or "cuda"'):
        resolve_device("tpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("processor: 0\nmodel name\t: Some CPU @ 2 GHz\nflags: a\nmodel name: other\n", "Some CPU @ 2 GHz"), ("", None)],
)
def test_the_processor_is_named_as_the_system_names_it(
    text: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import platform

    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(devices, "CPU_FACTS", tmp_path / "cpuinfo")
    assert processor_name("cpu") == (expected or platform.machine())
    monkeypatch.setattr(devices, "CPU_FACTS", tmp_path / "absent")
    assert processor_name("cpu") == platform.machine()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert processor_name("cuda") == "Some GPU"
