"""What an export copies: what is new or has changed, encoders of at most a megabyte, and nothing that was altered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import blto
from blto.attacks.untrained_generator import fresh_generator_trigger
from blto.cli import main
from blto.errors import Mismatch
from blto.experiment.outcome import TRIGGER
from blto.files import read_json, sha256_file, write_text
from blto.files.safetensors import read_safetensors
from blto.files.yaml import dump_yaml
from blto.models.checkpoints import save_encoder
from blto.models.encoder import build_encoder
from blto.poisoning import PatchTrigger, save_trigger
from blto.records import RunRecord, RunStore
from blto.sweep import export
from blto.sweep.plan import Cell, read_sweep
from blto.sweep.results import CellResult, Results
from tests.factories import TINY_BACKBONE
from tests.tiny_experiment import TINY_EXPERIMENT

SWEEPS = Path(__file__).parents[2] / "configs" / "sweeps"
TWIN = "pretrain-0123456789abcdef"


def finish(cell: Cell, store: Path, sweep: str, victim: str = "pretrain-fedcba9876543210") -> None:
    """What a finished cell leaves, its clean twin included."""
    run_id = cell.spec.run_id
    folder, twin = store / run_id, store / "stages" / TWIN
    for target in (folder / "encoder.safetensors", twin / "encoder.safetensors"):
        encoder = build_encoder(TINY_BACKBONE, seed=cell.spec.seed if target.parent == folder else 9, image_size=16)
        save_encoder(target, encoder, TINY_BACKBONE, 16)
    write_text(folder / "log.jsonl", "{}\n")
    patch = torch.zeros(3, 4, 4, dtype=torch.uint8)
    save_trigger(folder / "trigger.safetensors", PatchTrigger(patch, seed=0, placement=(0, 1), test_placement=(0, 1)))
    names = ("encoder.safetensors", "log.jsonl", "trigger.safetensors")
    artefacts = {name: sha256_file(folder / name) for name in names}
    stages = {"clean_twin": TWIN, "victim": victim}
    spec = cell.spec.model_dump(mode="json")
    record = RunRecord(
        run_id=run_id, spec=spec, metrics={}, took=False, provenance={"stages": stages}, artefacts=artefacts
    )
    RunStore(store).save(record)
    Results(store, sweep).save(CellResult(cell=cell.id, run_id=run_id, status="done", seconds=1.0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sweep of three cells, two of which are done."""
    file = tmp_path / "mine.yaml"
    file.write_text(dump_yaml({"base": TINY_EXPERIMENT, "seeds": [0, 1, 2]}))
    for cell in read_sweep(file).cells[:2]:
        finish(cell, tmp_path / "store", "mine")
    return file


def test_an_export_copies_what_is_new_or_has_changed(file: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    cells = read_sweep(file).cells
    first = blto.sweep(file, store=store, device="cpu", export=out).exported
    assert first is not None
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    each = ("result.json", "record.json", "log.jsonl", "encoder.safetensors", "trigger.safetensors")
    assert names == {f"{cell.id}/{name}" for cell in cells[:2] for name in each} | {f"clean_twins/{TWIN}.safetensors"}
    assert {path.relative_to(out).as_posix() for path in first.copied} == names
    assert not first.left_out
    assert not first.unchanged

    finish(cells[2], store, "mine")
    (out / cells[0].id / "log.jsonl").write_text("something else")
    second = blto.sweep(file, store=store, device="cpu", export=out).exported
    assert second is not None
    copied = {path.relative_to(out).as_posix() for path in second.copied}
    assert copied == {f"{cells[2].id}/{name}" for name in each} | {f"{cells[0].id}/log.jsonl"}
    assert len(second.unchanged) == len(names) - 1
    assert read_json(out / cells[2].id / "result.json")["run_id"] == cells[2].spec.run_id


def test_the_encoder_of_a_clean_run_is_not_exported_twice(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(dump_yaml({"base": {**TINY_EXPERIMENT, "attack": "clean"}, "seeds": [0]}))
    (cell,) = read_sweep(file).cells
    finish(cell, tmp_path / "store", "mine", victim=TWIN)
    exported = blto.sweep(file, store=tmp_path / "store", device="cpu", export=tmp_path / "out").exported
    assert exported is not None
    assert not exported.left_out
    assert not (tmp_path / "out" / "clean_twins").exists()
    assert (tmp_path / "out" / cell.id / "encoder.safetensors").exists()


def test_an_exported_encoder_is_fp16_on_disk_and_fp32_in_memory(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    blto.sweep(file, store=tmp_path / "store", device="cpu", export=out)
    path = out / read_sweep(file).cells[0].id / "encoder.safetensors"
    arrays, _ = read_safetensors(path)
    assert {array.dtype.name for array in arrays.values()} == {"float16", "int64"}
    encoder = blto.load_encoder(path)
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32, torch.int64}
    images = torch.rand(2, 3, 16, 16)
    expected = build_encoder(TINY_BACKBONE, seed=0, image_size=16).eval()(images)
    assert torch.allclose(encoder(images), expected, atol=1e-2)


def test_a_large_encoder_or_trigger_is_left_out_and_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "MAX_BYTES", dict.fromkeys(export.MAX_BYTES, 100))
    out = tmp_path / "out"
    arguments = ["sweep", str(file), "--store", str(tmp_path / "store"), "--device", "cpu", "--export", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "6 files copied, 0 unchanged." in shown
    assert shown.count("left out: ") == 6
    assert "bytes, more than 100." in shown
    assert not list(out.rglob("*.safetensors"))


def test_the_trigger_of_the_bank_s_generator_is_small_enough(tmp_path: Path) -> None:
    cell = next(cell for cell in read_sweep(SWEEPS / "bank_fresh.yaml").cells if cell.name == "blto_fresh")
    generator, epsilon = cell.spec.attack["generator"], cell.spec.attack["epsilon"]
    save_trigger(tmp_path / TRIGGER, fresh_generator_trigger(generator, epsilon, "residual", seed=0))
    assert (tmp_path / TRIGGER).stat().st_size < export.MAX_BYTES[TRIGGER]


def test_an_altered_file_is_never_exported(file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / read_sweep(file).cells[1].spec.run_id / "log.jsonl").write_text("{}\n{}\n")
    with pytest.raises(Mismatch, match="is not the file that was recorded"):
        blto.sweep(file, store=store, device="cpu", export=tmp_path / "out")
