"""A scan from a file to its verdict, on tiny encoders: what is read, compared, kept, refused, and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import blto
from blto.audit import encoder as encoder_module
from blto.audit import looking
from blto.audit.encoder import EncoderScan, scan_encoder, usual_detectors
from blto.audit.reading import suspect_of
from blto.audit.scan import as_plain
from blto.audit.verdict import Verdict
from blto.cli import main
from blto.defenses.base import Conditions, Inspection, inspect_encoder
from blto.defenses.decree import DECREE
from blto.errors import ConfigError, InputRefused
from blto.files import sha256_file
from blto.models.checkpoints import load_encoder, save_encoder
from blto.models.encoder import build_encoder
from blto.records import RunStore
from tests.cli.test_bad_input import refused
from tests.factories import TINY_BACKBONE, random_images, tiny_encoders
from tests.files.foreign.made import in_legacy, in_zip, named, saved

IMAGES = random_images(64, size=16).without_labels()
DETECTOR = {"name": "decree", "images": 64, "batch_size": 32, "epochs": 2, "similarity": 0.5}
DATA = "{name: synthetic, train_size: 40, test_size: 64, image_size: 16}"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny_encoders(tmp_path_factory.mktemp("encoders"), 21)


def scan(path: Path, store: Path, clean: list[Path] | None = None, **options: Any) -> EncoderScan:
    given = {"detectors": [DETECTOR], "clean": clean or [], "store": RunStore(store), **options}
    return scan_encoder(path, IMAGES, **given)


def test_enough_clean_encoders_give_a_verdict_with_a_p_value(encoders: list[Path], tmp_path: Path) -> None:
    found = scan(encoders[0], tmp_path, encoders[1:])
    (outcome,) = found.outcomes
    assert len(outcome.clean) == 20
    assert found.judgement.p_value == outcome.p_value
    above = sum(score >= outcome.score for score in outcome.clean)
    assert outcome.p_value == pytest.approx((1 + above) / 21)
    assert found.judgement.verdict is (Verdict.SUSPECT if above == 0 else Verdict.CLEAN)
    assert found.sha256 == sha256_file(encoders[0])
    assert (found.file, found.format) == ("00.safetensors", "blto")
    assert found.images == "64 images of noise"
    json.dumps(as_plain(found), allow_nan=False)


def test_an_inspection_is_made_once_and_kept(
    encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan(encoders[0], tmp_path, encoders[1:3])
    looked = []

    def inspecting(*given: Any) -> Inspection:
        looked.append(1)
        return inspect_encoder(*given)

    monkeypatch.setattr(looking, "inspect_encoder", inspecting)
    again = scan(encoders[0], tmp_path, encoders[1:3])
    assert not looked
    assert again.outcomes == first.outcomes
    for name, value in first.inspections[0].trigger.items():
        assert torch.equal(value, again.inspections[0].trigger[name])
    scan(encoders[0], tmp_path, encoders[1:4])
    assert len(looked) == 1
    scan(encoders[0], tmp_path, seed=1)
    assert len(looked) == 2


def test_without_clean_encoders_or_with_few_it_is_inconclusive(encoders: list[Path], tmp_path: Path) -> None:
    for clean in ([], encoders[1:4]):
        assert scan(encoders[0], tmp_path, clean).judgement.verdict is Verdict.INCONCLUSIVE


def test_an_encoder_given_twice_counts_once_and_the_suspect_itself_not_at_all(
    encoders: list[Path], tmp_path: Path
) -> None:
    again = tmp_path / "again.safetensors"
    shutil.copyfile(encoders[1], again)
    found = scan(encoders[0], tmp_path / "s", [encoders[1], encoders[1], again, encoders[0], encoders[2]])
    assert len(found.outcomes[0].clean) == 2
    with pytest.raises(ConfigError, match="--drill is 2, with 1 clean encoders"):
        scan(encoders[0], tmp_path / "s", [encoders[1], again], drill=2)


def test_a_drill_tampers_with_copies_of_clean_encoders(
    encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "DRILL_STEPS", 6)
    before = encoders[1].read_bytes()
    found = scan(encoders[0], tmp_path, encoders[1:4], drill=2)
    assert len(found.outcomes[0].planted) == 2
    assert found.judgement.power is not None
    assert found.judgement.power[3] == 2
    assert encoders[1].read_bytes() == before
    looker = looking.Looking(IMAGES, RunStore(tmp_path), Conditions())
    suspect = suspect_of(load_encoder(encoders[1]), "a", sha256_file(encoders[1]), "blto")
    planted, cosine = looker.plant(suspect)
    assert 0 < cosine <= 1
    weights = [each.encoder.state_dict()["backbone.stem.0.weight"] for each in (suspect, planted)]
    assert not torch.equal(*weights)
    assert planted.identity != suspect.identity
    monkeypatch.setattr(encoder_module, "BOUND", 1.1)
    found = scan(encoders[0], tmp_path, encoders[1:4], drill=2)
    assert found.judgement.power is None
    assert "2 of the drill's 2 backdoors did not bind" in found.notes[0]


def test_what_is_kept_belongs_to_the_weights_and_not_to_the_file(tmp_path: Path) -> None:
    nets = [build_encoder("small_resnet", seed=seed, image_size=16).backbone.state_dict() for seed in (0, 1)]
    both = {f"{name}.{key}": value for name, net in zip("ab", nets, strict=True) for key, value in net.items()}
    (tmp_path / "both.pt").write_bytes(saved(both))

    def score(store: str, **options: Any) -> float:
        given = {"image_size": 16, **options}
        found = scan(tmp_path / "both.pt", tmp_path / store, arch="small_resnet", options=given)
        return found.outcomes[0].score

    first, second = (score("one", key_prefix=f"{name}.") for name in "ab")
    assert (first, second) == (score("other", key_prefix="a."), score("another", key_prefix="b."))
    assert first != second
    assert score("one", key_prefix="a.", mean=(0.0, 0.0, 0.0)) == score("new", key_prefix="a.", mean=(0.0, 0.0, 0.0))


def test_a_detector_that_cannot_inspect_such_a_net_is_left_out_and_said(
    encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DECREE, "reason_against", lambda self, encoder: "it has no eyes")
    found = scan(encoders[0], tmp_path, detectors=[DETECTOR, {"name": "channel_outlier"}])
    assert [outcome.detector for outcome in found.outcomes] == ["channel_outlier"]
    assert found.not_tested[0] == "DECREE: it has no eyes."
    with pytest.raises(ConfigError, match=r"none of them can inspect 00.safetensors; DECREE: it has no eyes"):
        scan(encoders[0], tmp_path)


def test_decree_gets_its_authors_settings_for_the_size_of_the_images() -> None:
    small, large = (usual_detectors(size)[0] for size in (32, 224))
    assert small == {"name": "decree", "starts": 9, "begin": "windows", "epochs": 100}
    assert large == {**small, "least_lambda": 1e-7, "patience": 35}


@pytest.mark.parametrize("pack", [in_zip, in_legacy], ids=["zip", "legacy"])
def test_a_file_that_holds_code_is_a_finding(pack: Any, tmp_path: Path) -> None:
    file = tmp_path / "evil.pt"
    file.write_bytes(pack(named("posix", "system", "echo")))
    found = scan(file, tmp_path / "store", arch="small_resnet")
    assert found.judgement.verdict is Verdict.SUSPECT
    assert "posix.system" in found.judgement.reasons[0]
    assert not found.outcomes
    assert found.not_tested


def test_weights_that_are_no_numbers_are_a_finding(tmp_path: Path) -> None:
    state = build_encoder("small_resnet", seed=0, image_size=16).backbone.state_dict()
    state["stem.0.weight"][0] = float("nan")
    (tmp_path / "nan.pt").write_bytes(saved(state))
    found = scan(tmp_path / "nan.pt", tmp_path / "s", arch="small_resnet", options={"image_size": 16})
    assert found.judgement.verdict is Verdict.SUSPECT
    assert "1 of 54 tensors hold NaN or Inf" in found.judgement.reasons[0]


def test_so_are_those_of_an_encoder_of_blto_s_own_and_features_that_are_none(
    encoders: list[Path], tmp_path: Path
) -> None:
    for name, value in (("nan", float("nan")), ("huge", 6e4)):
        encoder = load_encoder(encoders[0])
        with torch.no_grad():
            for norm in encoder.modules():
                if isinstance(norm, torch.nn.BatchNorm2d):
                    norm.weight.fill_(value)
                    norm.running_var.fill_(1e-6)  # type: ignore[union-attr]  # ours track it
        save_encoder(tmp_path / f"{name}.safetensors", encoder, TINY_BACKBONE, 16)
        found = scan(tmp_path / f"{name}.safetensors", tmp_path / "s", encoders[1:])
        assert found.judgement.verdict is Verdict.SUSPECT, name
        assert "NaN or Inf" in found.judgement.reasons[0]


def test_a_file_that_is_no_checkpoint_is_refused(encoders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"no checkpoint")
    with pytest.raises(InputRefused, match="neither safetensors nor a checkpoint"):
        scan(tmp_path / "a.pt", tmp_path / "s", arch="small_resnet")
    with pytest.raises(InputRefused, match="the defense needs 65; give more"):
        scan(encoders[0], tmp_path / "s", detectors=[{**DETECTOR, "images": 65}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "--alpha is 0; give a share"),
        ({"alpha": float("nan")}, "--alpha is nan; give a share"),
        ({"drill": 1}, "--drill is 1, with 0 clean encoders"),
        ({"drill": -1}, "--drill is -1; give 0 or more"),
        ({"detectors": [5]}, "--detector: 5 is neither a defense's name nor a mapping"),
        ({"detectors": [{"name": "decre"}]}, 'unknown defense "decre"; did you mean "decree"'),
        (
            {"detectors": [{"name": "clp"}]},
            "--detector clp: it does not inspect encoders; those that do: channel_outlier, decree",
        ),
        ({"detectors": [{"name": "decree", "epochs": 0}]}, "--detector.epochs: .* greater than or equal to 1"),
        ({"options": {"mean": (0, 0, 0)}}, "mean: only for an encoder that others have trained; give --arch too"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: dict[str, Any], message: str, encoders: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        scan(encoders[0], tmp_path, **options)


def test_a_clean_encoder_of_another_family_is_refused(encoders: list[Path], tmp_path: Path) -> None:
    other = {"name": "small_resnet", "width": 8}
    save_encoder(tmp_path / "other.safetensors", build_encoder(other, seed=0, image_size=16), other, 16)
    with pytest.raises(ConfigError, match=r"--clean other.safetensors: is of another family than 00.safetensors"):
        scan(encoders[0], tmp_path / "s", [tmp_path / "other.safetensors"])


def command(encoders: list[Path], tmp_path: Path, *more: str) -> list[str]:
    file = tmp_path / "<b>suspect.safetensors"
    shutil.copyfile(encoders[0], file)
    detector = "{name: decree, images: 64, batch_size: 32, epochs: 2, similarity: 0.5}"
    places = ["--store", str(tmp_path / "store"), "--detector", detector, "--data", DATA, "--quiet"]
    return ["scan", "encoder", str(file), *places, *more]


def test_the_command_writes_page_sarif_and_json_and_leaves_with_the_verdict(
    encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, sarif = tmp_path / "scan.html", tmp_path / "scan.sarif"
    given = command(encoders, tmp_path, "--page", str(page), "--sarif", str(sarif))
    assert main([*given, "--json", "--clean", str(encoders[1])]) == 8
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["power"]) == ("inconclusive", None)
    assert found["detectors"][0]["p_value"] in (0.5, 1.0)
    text = page.read_text()
    assert "Inconclusive" in text
    assert "&lt;b&gt;suspect" in text
    assert "<b>suspect" not in text
    assert "<script" not in text
    assert text.count("<svg") == 2
    result = json.loads(sarif.read_text())
    assert result["version"] == "2.1.0"
    (run,) = result["runs"]
    (entry,) = run["results"]
    assert (entry["ruleId"], entry["level"]) == ("encoder-inconclusive", "note")
    assert run["tool"]["driver"]["rules"][entry["ruleIndex"]]["id"] == entry["ruleId"]
    assert run["artifacts"][0]["hashes"]["sha-256"] == sha256_file(encoders[0])
    assert entry["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "%3Cb%3Esuspect.safetensors"


def test_the_command_finds_clean_encoders_in_a_folder_and_ends_with_0_or_1(
    encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clean" / "deep"
    folder.mkdir(parents=True)
    for file in encoders[1:]:
        shutil.copyfile(file, folder / file.name)
    code = main(command(encoders, tmp_path, "--clean-dir", str(folder.parent)))
    shown = capsys.readouterr().out
    assert code == {"clean": 0, "suspect": 1}[shown.split(": ")[1].split(",")[0]]
    assert "of 20 clean encoders" in shown
    assert "not tested: " in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clean-dir", "nowhere"], "--clean-dir nowhere: there is no *.safetensors in it"),
        (["--data", "5"], "5 is neither a dataset's name nor a mapping with a name"),
        (["--detector", "[1, 2]"], "[1, 2] is neither a defense's name nor a mapping with a name"),
    ],
)
def test_the_command_refuses_what_it_cannot_use_in_one_line(
    more: list[str], message: str, encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *command(encoders, tmp_path, *more))


def test_the_call_is_public() -> None:
    assert blto.scan.__module__ == "blto.audit.scan"
