"""The Python calls, stage by stage on an experiment of seconds, and that the command line is the same calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import blto
from blto import experiment
from blto.cli import main
from blto.configuration import read_specs
from blto.data.images import ImageSet
from blto.errors import ConfigError, Mismatch
from blto.experiment import ExperimentSpec
from blto.experiment.outcome import log_of
from blto.files import append_jsonl, read_jsonl, sha256_file
from blto.files.yaml import dump_yaml
from blto.models.encoder import Encoder
from blto.models.native import resnet
from blto.pretraining import trainer
from blto.records import RunRecord, RunStore
from blto.runtime.device import processor_name
from tests.tiny_experiment import TINY_EXPERIMENT


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def config(store: Path) -> Path:
    path = store.parent / "tiny.yaml"
    path.write_text(dump_yaml(TINY_EXPERIMENT))
    return path


@pytest.fixture(scope="module")
def record(store: Path) -> RunRecord:
    (found,) = blto.run(TINY_EXPERIMENT, store=store, device="cpu", quiet=True)
    return found


def stages(store: Path) -> dict[str, int]:
    """When each stage was committed."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (store / "stages").glob("*/stage.json")}


def test_run_leaves_the_folder_that_the_architecture_promises(record: RunRecord, store: Path) -> None:
    folder = store / record.run_id
    assert blto.load_record(str(folder)) == record
    names = {
        "record.json",
        "spec.yaml",
        "trigger.safetensors",
        "encoder.safetensors",
        "poison_manifest.json",
        "log.jsonl",
        "figures",
    }
    assert names <= {path.name for path in folder.iterdir()}
    assert all(sha256_file(folder / name) == digest for name, digest in record.artefacts.items())
    assert set(record.metrics) == {"linear", "knn"}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(record.artefacts) == files - {"record.json", ".lock"}


def test_the_log_holds_every_stage_and_no_clock(record: RunRecord, store: Path) -> None:
    lines = list(read_jsonl(store / record.run_id / "log.jsonl"))
    assert list(dict.fromkeys(line["stage"] for line in lines)) == ["craft", "clean_twin", "victim"]
    crafting = [line for line in lines if line["stage"] == "craft"]
    assert [{**line, "stage": "craft", "event": "crafting"} for line in record.crafting] == crafting
    for stage in ("victim", "clean_twin"):
        own = [line for line in lines if line["stage"] == stage]
        assert [line["epoch"] for line in own if line["event"] == "observed"] == [0, 1, 2]
        assert [line["step"] for line in own if line["event"] == "step"] == [14]
    known = {"stage", "event", "epoch", "step", "loss", "period", "trigger", "clean", "target"}
    assert {key for line in lines for key in line} == known


def test_the_log_does_not_tell_how_often_a_stage_was_started(tmp_path: Path) -> None:
    stage = RunStore(tmp_path).stage("craft", {})
    row = {"event": "crafting", "step": 10.0, "trigger": 0.5}
    lines = [row, {"event": "observed", "epoch": 1.0}, {"event": "resumed", "step": 3}, row, {**row, "step": 20.0}]
    for line in lines:
        append_jsonl(stage.path / "log.jsonl", line)
    kept = [json.loads(line) for line in log_of({"craft": stage}).splitlines()]
    assert kept == [{**line, "stage": "craft"} for line in (lines[0], lines[1], lines[4])]


def test_the_record_says_where_and_in_which_arithmetic_each_stage_was_trained(record: RunRecord) -> None:
    trained, machine = record.provenance["trained_on"], record.provenance["machine"]
    assert set(trained) == {"craft", "victim", "clean_twin"}
    for facts in trained.values():
        assert facts == {
            "device": "cpu",
            "processor": processor_name("cpu"),
            "precision": "fp32",
            "engine": "plain torch",
        }
    assert (machine["device"], machine["processor"]) == ("cpu", processor_name("cpu"))


def test_nan_in_a_run_of_few_steps_is_exit_7(config: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(config), "--set", "pretraining.optimizer.lr=1e20", "--quiet", "--device", "cpu"]
    assert main([*arguments, "--store", str(store)]) == 7
    err = capsys.readouterr().err
    assert err.startswith("blto: error[DIVERGED]: the loss became NaN or Inf at step ")
    assert err.count("\n") == 1


def test_encoders_are_evaluated_on_the_device(
    record: RunRecord, store: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[object] = []

    def to(self: Encoder, place: str) -> Encoder:
        moved.append(place)
        return self

    monkeypatch.setattr(Encoder, "to", to)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = store / record.run_id
    encoder = folder / "encoder.safetensors"
    blto.evaluate(
        config, encoder=encoder, clean_twin=encoder, trigger=folder / "trigger.safetensors", device="cuda", quiet=True
    )
    assert moved == ["cuda", "cuda"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_recorded(record: RunRecord, store: Path, config: Path) -> None:
    folder = store / record.run_id
    encoder, trigger = folder / "encoder.safetensors", folder / "trigger.safetensors"
    on_cpu, on_gpu = (
        blto.evaluate(config, encoder=encoder, clean_twin=encoder, trigger=trigger, device=device, quiet=True)
        for device in ("cpu", "cuda")
    )
    first, second = on_cpu["linear"]["asr"].value, on_gpu["linear"]["asr"].value
    assert first is not None
    assert second == pytest.approx(first, abs=0.05)


def test_a_surrogate_may_have_a_view_recipe_with_changes(store: Path) -> None:
    views = {"name": "simclr_cifar", "grayscale_probability": 0.5}
    bilevel = TINY_EXPERIMENT["attack"]["bilevel"]
    surrogate = {**bilevel["surrogate"], "views": views}
    config = TINY_EXPERIMENT | {"attack": TINY_EXPERIMENT["attack"] | {"bilevel": {**bilevel, "surrogate": surrogate}}}
    config |= {"pretraining": TINY_EXPERIMENT["pretraining"] | {"views": views}}
    (found,) = blto.run(config, store=store, device="cpu", quiet=True)
    kept = found.spec["attack"]["bilevel"]["surrogate"]["views"]
    assert kept["grayscale_probability"] == 0.5
    assert kept == found.spec["pretraining"]["views"]


def test_the_command_line_makes_the_same_run_and_does_not_make_it_twice(
    record: RunRecord, store: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stages(store)
    assert main(["run", str(config), "--store", str(store), "--device", "cpu", "--quiet", "--json"]) == 0
    captured = capsys.readouterr()
    (printed,) = json.loads(captured.out)["runs"]
    assert RunRecord.model_validate(printed) == record
    assert captured.err == ""
    assert stages(store) == before


def test_the_table_and_the_verdict_are_printed(
    record: RunRecord, store: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(config), "--store", str(store), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"{record.run_id}: took: false." in out
    assert "Lift" in out


def test_the_spec_in_the_folder_runs_the_same_thing_again(record: RunRecord, store: Path) -> None:
    (again,) = blto.run(store / record.run_id / "spec.yaml", store=store, device="cpu", quiet=True)
    assert again == record


def test_a_probe_is_changed_without_training_again(record: RunRecord, store: Path, config: Path) -> None:
    before = stages(store)
    (changed,) = blto.run(config, set=["probes={knn: {k: 5}}"], store=store, device="cpu", quiet=True)
    assert set(changed.metrics) == {"knn"}
    assert stages(store) == before


def test_craft_gives_the_trigger_of_the_run(record: RunRecord, store: Path, config: Path, tmp_path: Path) -> None:
    file = blto.craft(config, tmp_path / "new" / "t.safetensors", store=store, device="cpu", quiet=True)
    assert file == tmp_path / "new" / "t.safetensors"
    assert file.read_bytes() == (store / record.run_id / "trigger.safetensors").read_bytes()
    images = torch.rand(2, 3, 16, 16)
    change = (blto.load_trigger(str(file))(images) - images).abs().max()
    assert 0 < change <= 8 / 255 + 1e-6


def test_poison_writes_a_set_that_verifies_and_an_altered_one_does_not(
    record: RunRecord, store: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trigger = store / record.run_id / "trigger.safetensors"
    out = tmp_path / "poisoned"
    command = ["poison", str(config), "--out", str(out), "--trigger", str(trigger), "--layout", "png", "--quiet"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert blto.verify(str(out)).n_poisoned == 6
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["poison_rate"] == 0.05
    assert main(command) == 2, "the folder is not empty any more"
    capsys.readouterr()
    first, second = sorted((out / "train").rglob("*.png"))[:2]
    first.write_bytes(second.read_bytes())
    assert main(["verify", str(out)]) == 6
    assert first.name in capsys.readouterr().err


def test_pretrain_needs_no_attack_and_its_encoder_is_the_clean_twin(
    record: RunRecord, store: Path, config: Path, tmp_path: Path
) -> None:
    before = stages(store)
    without_attack = {key: value for key, value in TINY_EXPERIMENT.items() if key != "attack"}
    file = blto.pretrain(without_attack, tmp_path / "e.safetensors", store=store, device="cpu", quiet=True)
    assert stages(store) == before, "the run's clean twin was trained on the same images with the same seed"
    assert blto.load_encoder(str(file))(torch.rand(2, 3, 16, 16)).shape == (2, 16)


def test_pretrain_leaves_held_out_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ImageSet] = []

    def stage(spec: Any, images: ImageSet, where: Any) -> Any:
        seen.append(images)
        raise Mismatch("seen")

    monkeypatch.setattr(experiment, "pretrain_stage", stage)
    for held_out in (0, 20):
        with pytest.raises(Mismatch, match="seen"):
            blto.pretrain({**TINY_EXPERIMENT, "held_out": held_out}, store=tmp_path, device="cpu", quiet=True)
    everything, rest = seen
    assert len(rest) == len(everything) - 20


def test_evaluate_finds_what_the_run_recorded(record: RunRecord, store: Path, config: Path) -> None:
    twin = blto.pretrain(config, store=store, device="cpu", quiet=True)
    folder = store / record.run_id
    metrics = blto.evaluate(
        config,
        encoder=folder / "encoder.safetensors",
        clean_twin=twin,
        trigger=folder / "trigger.safetensors",
        quiet=True,
    )
    assert metrics == record.metrics


def test_evaluate_prints_every_metric(
    record: RunRecord, store: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store / record.run_id
    encoder = str(folder / "encoder.safetensors")
    files = ["--encoder", encoder, "--clean-twin", encoder, "--trigger", str(folder / "trigger.safetensors")]
    assert main(["evaluate", str(config), *files, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in record.metrics["linear"])


def test_report_takes_ids_folders_and_the_whole_store(record: RunRecord, store: Path, tmp_path: Path) -> None:
    pages = [
        blto.report([record.run_id], out=tmp_path / "a.html", store=store),
        blto.report([str(store / record.run_id)], out=tmp_path / "b.html", store=tmp_path),
        blto.report([store / record.run_id / "record.json"], out=tmp_path / "c.html", store=tmp_path),
    ]
    assert len({page.read_text() for page in pages}) == 1
    assert record.run_id in pages[0].read_text()
    assert "<svg" in pages[0].read_text()
    assert record.run_id in blto.report(out=tmp_path / "all.html", store=store).read_text()


def test_report_refuses_an_altered_figure_and_an_empty_store(record: RunRecord, store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        blto.report(out=tmp_path / "none.html", store=tmp_path)
    figure = sorted((store / record.run_id / "figures").glob("*.svg"))[0]
    text = figure.read_text()
    figure.write_text(text.replace("<svg", "<svg ", 1))
    try:
        with pytest.raises(Mismatch, match=figure.name):
            blto.report([record.run_id], out=tmp_path / "altered.html", store=store)
    finally:
        figure.write_text(text)
    assert not (tmp_path / "altered.html").exists()


def test_list_shows_runs_beside_components(record: RunRecord, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert blto.list("run", store=store)["run"][record.run_id] == record
    assert main(["list", "run", "--store", str(store), "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)["run"][record.run_id]
    assert shown["took"] is False
    assert main(["list", "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert record.run_id in out
    assert "simclr" in out


def test_every_command_is_a_function_with_the_same_arguments() -> None:
    """An option of a command that its function lacks, or the reverse, is a difference that a user would meet."""
    import inspect

    from typer.main import get_command

    from blto.cli.app import app
    from blto.configuration import Options

    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group has commands
    assert set(commands) == {
        "demo",
        "run",
        "craft",
        "poison",
        "pretrain",
        "evaluate",
        "report",
        "list",
        "show",
        "verify",
        "sweep",
        "scan",
    }
    commands["scan"] = commands["scan"].commands["encoder"]
    spelled = {"set_": "set", "file": "encoder", "detector": "detectors", "clean_dir": "clean"}
    spelled |= dict.fromkeys(("key_prefix", "mean", "std"), "foreign")
    for name, command in commands.items():
        parameters = inspect.signature(getattr(blto, name)).parameters
        names = {parameter for parameter in parameters if parameter != "options"}
        if "options" in parameters:
            names |= set(Options.__annotations__)
        given = {option.name for option in command.params} - {"as_json", "help"}
        given = {spelled[option] if option in spelled and spelled[option] in names else option for option in given}
        unused = {"evaluate": {"resume"}, "sweep": {"resume"}, "scan": {"resume"}}
        allowed = {"demo": {"store", "data_root"}, **unused}.get(name, set())
        assert given <= names, name
        assert names - given <= allowed, name


@pytest.mark.parametrize("command", ["run", "craft", "poison", "pretrain", "demo"])
def test_the_engine_of_the_command_line_is_that_of_victim_and_surrogate(
    command: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stage runs: what would be run is enough."""
    asked: list[ExperimentSpec] = []

    def stop(spec: ExperimentSpec, *_: object) -> None:
        asked.append(spec)
        raise ConfigError("seen.")

    monkeypatch.setattr(experiment, "run_all", lambda specs, _: stop(specs[0]))
    monkeypatch.setattr(experiment, "load_data", stop)
    monkeypatch.setattr(experiment, "pretrain_stage", stop)
    monkeypatch.chdir(tmp_path)
    given = {"demo": [], "poison": [str(config), "--out", "p"]}.get(command, [str(config)])
    for engine in ("fast", "reference"):
        assert main([command, *given, "--engine", engine, "--quiet"]) == 2
    engines = [(spec.pretraining.engine, spec.attack["bilevel"]["surrogate"]["engine"]) for spec in asked]
    assert engines == [("fast", "fast"), ("reference", "reference")]


def test_the_engine_overrules_the_configuration_of_every_attack_and_else_is_left_alone() -> None:
    given = {**TINY_EXPERIMENT, "controls": ["clean", "untrained_generator", "frozen_surrogate"]}
    given["pretraining"] = {**given["pretraining"], "engine": "reference"}
    assert {spec.pretraining.engine for spec in read_specs(given, (), None)} == {"reference"}
    specs = read_specs(given, (), None, "fast")
    assert {spec.pretraining.engine for spec in specs} == {"fast"}
    assert specs[0].run_id == read_specs(given, ["pretraining.engine=fast"], None)[0].run_id
    assert [spec.attack["name"] for spec in specs] == ["blto", "clean", "untrained_generator", "frozen_surrogate"]


@pytest.mark.parametrize("command", ["run", "craft", "pretrain"])
def test_a_machine_without_the_kernels_says_once_which_path_it_takes(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (trainer, resnet):
        monkeypatch.setattr(module, "find_kernels", lambda: (None, "plain torch: there is no compiler"))
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(dump_yaml({**TINY_EXPERIMENT, "controls": ["clean", "untrained_generator"]}))
    changes = ["pretraining.precision=bf16", "pretraining.epochs=1", "attack.bilevel.surrogate.precision=bf16"]
    assert main([command, "a.yaml", *(word for change in changes for word in ("--set", change))]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "plain torch: there is no compiler" in line]
    what = "surrogates" if command == "craft" else "pretraining"
    assert told == [f"{what} in bf16 on {processor_name('cpu')}, plain torch: there is no compiler"]


def test_runs_are_kept_apart_by_their_spec(record: RunRecord) -> None:
    assert record.run_id == RunStore.run_id(record.spec)
