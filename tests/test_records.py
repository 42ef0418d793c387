"""Records: what is stored comes back exactly, and what was altered never does."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from blto.errors import BltoError, Busy, ConfigError, InputRefused, Mismatch
from blto.files.atomic import canonical_json, sha256_bytes
from blto.records import Metric, RunRecord, RunStore, load_record, took, without_private_text

SPEC: dict[str, Any] = {"attack": {"name": "blto", "poison_rate": 0.01}, "data": {"name": "cifar10"}, "seed": 3}


def record(lift: float | None = 0.85, **changes: Any) -> RunRecord:
    metrics = {"linear": {"lift": Metric(value=lift, low=0.8, high=0.9, n=9000), "asr": Metric(value=0.9, n=9000)}}
    fields: dict[str, Any] = {"run_id": RunStore.run_id(SPEC), "spec": SPEC, "metrics": metrics, "took": took(metrics)}
    return RunRecord(**{**fields, **changes})


def reseal(file: Path, **changes: Any) -> None:
    """Alter a record and make its checksum right again, as a newer or a foreign program would write it."""
    content = {**json.loads(file.read_text()), **changes}
    del content["sha256"]
    file.write_text(json.dumps({**content, "sha256": sha256_bytes(canonical_json(content))}))


def test_a_record_comes_back_exactly(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    saved = record(
        trajectory=[{"epoch": 1, "similarity_triggered": 0.1 + 0.2}], stealth={"linf": 8 / 255}, artefacts={"a": "b"}
    )
    file = store.save(saved)
    assert file == tmp_path / saved.run_id / "record.json"
    assert store.load(saved.run_id) == store.load(file) == store.load(file.parent) == load_record(file) == saved
    assert store.list() == [saved]


def test_the_json_has_the_names_that_others_rely_on(tmp_path: Path) -> None:
    content = json.loads(RunStore(tmp_path).save(record()).read_text())
    assert content["metrics"]["linear"]["lift"] == {"value": 0.85, "low": 0.8, "high": 0.9, "n": 9000}
    assert content["spec"]["attack"]["name"] == "blto"
    assert (content["schema_version"], content["status"], content["took"]) == (1, "ok", True)


@pytest.mark.parametrize(("lift", "expected"), [(0.5, True), (0.4999, False), (None, False), (-0.2, False)])
def test_took_is_a_lift_of_at_least_one_half(lift: float | None, expected: bool) -> None:
    assert record(lift).took is expected
    with pytest.raises(ValidationError, match="took is"):
        record(lift, took=not expected)


def test_without_a_linear_probe_nothing_took() -> None:
    assert record(metrics={}, took=False).metric("lift") is None


@pytest.mark.parametrize("change", [{"surprise": 1}, {"run_id": "../up"}, {"run_id": ""}, {"stealth": {"psnr": "NaN"}}])
def test_what_does_not_belong_in_a_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        record(**change)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_record_is_never_read_as_another(tmp_path: Path, where: int, bit: int, cut: bool) -> None:
    store = RunStore(tmp_path)
    file = store.save(record(provenance={"note": "caf\u00e9"}))
    data = bytearray(file.read_bytes())
    where %= len(data)
    if cut:
        del data[where:]
    else:
        data[where] ^= 1 << bit
    file.write_bytes(data)
    listed = store.list()
    if listed:  # the damage hit white space, or the spelling of a letter
        assert listed == [record(provenance={"note": "caf\u00e9"})]
    else:
        with pytest.raises(InputRefused, match=r"record\.json"):
            store.load(file)


def test_a_run_without_a_record_has_not_happened(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    assert store.list() == []
    store.folder("blto-cifar10-s0-0").mkdir(parents=True)
    assert store.list() == []
    with pytest.raises(InputRefused, match="no such record"):
        store.load("blto-cifar10-s0-0")
    with pytest.raises(InputRefused, match="no such record"):
        store.load("never")


def test_a_newer_schema_is_a_mismatch_and_not_left_out_quietly(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    reseal(store.save(record()), schema_version=2, news="good")
    with pytest.raises(Mismatch, match="schema 2") as caught:
        store.load(record().run_id)
    assert caught.value.exit_code == 6
    with pytest.raises(Mismatch):
        store.list()


@pytest.mark.parametrize("change", [{"schema_version": "1"}, {"took": False}, {"metrics": 3}, {"extra": 1}])
def test_a_sealed_record_with_wrong_content_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = RunStore(tmp_path).save(record())
    reseal(file, **change)
    with pytest.raises(InputRefused, match=r"record\.json"):
        load_record(file)


def test_run_ids_are_readable_and_follow_the_spec() -> None:
    name = RunStore.run_id(SPEC)
    assert name == RunStore.run_id(dict(reversed(SPEC.items())))
    assert name.startswith("blto-cifar10-s3-")
    assert len(name.rsplit("-", 1)[1]) == 10
    assert RunStore.run_id({**SPEC, "extra": 1}) != name
    assert RunStore.run_id({**SPEC, "data": {"name": "../x"}}).startswith("blto-___x-s3-")
    with pytest.raises(ConfigError, match="seed"):
        RunStore.run_id({"attack": {"name": "blto"}, "data": {"name": "cifar10"}})


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "a\nb", "x" * 300])
def test_a_run_id_cannot_leave_the_store(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        RunStore(tmp_path).folder(name)


def test_a_run_is_worked_on_by_one_process(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.lock("r"), pytest.raises(Busy), store.lock("r"):
        pass


def test_records_keep_no_home_user_or_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "lab-7")
    spec = {**SPEC, "data": {"name": "image_folder", "path": "/srv/people/ada/cats", "mirror": ["/home/eve/x"]}}
    provenance = {
        "argv": "blto run C:\\Users\\Bob\\x.yaml",
        "where": "lab-7:/Users/mallory/y",
        "deep": {"p": Path("/home/eve")},
    }
    file = RunStore(tmp_path).save(record(spec=spec, provenance=provenance))
    text = file.read_text()
    assert not [secret for secret in ("ada", "eve", "Bob", "mallory", "lab-7", "/srv") if secret in text]
    assert json.loads(text)["spec"]["data"]["path"] == "~/cats"
    assert load_record(file) == record(spec=spec, provenance=provenance)


def test_private_text_is_cut_at_path_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setattr(socket, "gethostname", lambda: "host1")
    assert without_private_text("/rootbeer /root/a /x/root host10 3") == "/rootbeer ~/a /x/root host10 3"
    assert without_private_text({"n": 3, "b": None}) == {"n": 3, "b": None}


def test_a_stage_of_a_version_with_other_results_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path)
    store.stage("pretrain", {"seed": 1}).commit({})
    assert store.stage("pretrain", {"seed": 1}).complete
    monkeypatch.setattr("blto.records.RESULTS_VERSION", -1)
    assert not store.stage("pretrain", {"seed": 1}).complete


def test_a_stage_is_complete_once_committed_and_while_its_files_are_unchanged(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    stage = store.stage("pretrain", {"seed": 1})
    assert stage.path.parent == tmp_path / "stages"
    assert stage.path.name.startswith("pretrain-")
    assert not stage.complete
    (stage.path / "deep").mkdir()
    (stage.path / "deep" / "encoder.bin").write_bytes(b"weights")
    (stage.path / ".lock").write_bytes(b"")
    stage.commit({"epochs": 4})
    (stage.path / ".lock").unlink()

    again = store.stage("pretrain", {"seed": 1})
    assert again.complete
    assert again.facts == {"epochs": 4}
    assert not store.stage("pretrain", {"seed": 2}).complete
    assert store.list() == []

    for damage in (lambda file: file.write_bytes(b"Weights"), Path.unlink):
        damage(stage.path / "deep" / "encoder.bin")
        assert not store.stage("pretrain", {"seed": 1}).complete


def test_a_damaged_stage_file_is_not_complete(tmp_path: Path) -> None:
    stage = RunStore(tmp_path).stage("craft", {})
    stage.commit({"x": 1})
    (stage.path / "stage.json").write_text((stage.path / "stage.json").read_text().replace('"x": 1', '"x": 2'))
    assert not stage.complete
    with pytest.raises(BltoError, match="checksum"):
        _ = stage.facts


def test_a_stage_that_one_of_the_group_makes_is_waited_for_and_not_made_again(tmp_path: Path) -> None:
    first, second = (RunStore(tmp_path, group="a").stage("craft", {"seed": 1}) for _ in range(2))
    inside = threading.Event()
    needed: list[bool] = []

    def work() -> None:
        with first.making() as needs:
            needed.append(needs)
            inside.set()
            time.sleep(0.3)
            first.commit({})

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    assert not second.complete
    with pytest.raises(Busy), RunStore(tmp_path).stage("craft", {"seed": 1}).making():
        pass
    with second.making() as needs:
        needed.append(needs)
    thread.join()
    assert needed == [True, False]
