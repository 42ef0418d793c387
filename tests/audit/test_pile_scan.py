"""A scan of images from a folder to its verdict: what is found, read, refused, listed and written."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blto
from blto.audit.pile import chunks, drill, scan
from blto.audit.pile.chunks import Summary, added, nothing, score_chunk
from blto.audit.pile.lessons import syllabus
from blto.audit.pile.screens import build_screens
from blto.audit.pile.sources import Folder, Loaded
from blto.audit.pile.working import unlike
from blto.audit.verdict import Verdict
from blto.cli import main
from blto.data.images import ImageSet
from blto.errors import BltoError, ConfigError, InputRefused
from blto.files.images import encode_jpeg
from blto.poisoning import FrequencyTrigger, apply_to_uint8, plan_replacement, write_poisoned
from blto.poisoning.dataset import PoisonedDataset
from blto.records import RunStore
from blto.runtime import on_ray
from blto.runtime.executors import WITH_RAY, Serial, build_executor
from tests.audit.piles import CLEAN, EVERY, SUSPECTS, patched, scanned, shapes, without_times, write
from tests.audit.test_sarif import problems
from tests.cli.test_bad_input import refused


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("piles")
    images = shapes().images
    return {
        "patched": write(root / "patched", patched()),
        "innocent": write(root / "innocent", images[:SUSPECTS]),
        "clean": write(root / "clean", images[SUSPECTS:]),
        "store": root / "store",
    }


def command(suspects: Path | str, clean: Path | str | None, store: Path, *more: str) -> list[str]:
    """The words of a scan of folders or data sets."""
    known = [] if clean is None else ["--clean", str(clean)]
    return ["scan", "data", str(suspects), *known, "--store", str(store), "--quiet", *more]


def test_pasted_patches_make_a_pile_suspect_and_are_named(places: dict[str, Path], tmp_path: Path) -> None:
    found = scanned(places["patched"], places["clean"], tmp_path)
    assert found.judgement.verdict is Verdict.SUSPECT
    assert found.judgement.p_value is not None
    assert found.judgement.p_value < 1e-3
    windows = found.found[1]
    poisons = {f"{row % 2}/{row:05d}.png" for row in range(0, SUSPECTS, EVERY)}
    assert {name for name, score in windows.top if score > 0} == poisons
    assert windows.best is not None
    assert (windows.best.suspects, windows.best.clean) == (len(poisons), 0)
    assert (found.count, found.clean_count) == (SUSPECTS, CLEAN - CLEAN // 4), "a quarter was learned from"


def test_clean_images_are_clean_and_without_others_to_compare_inconclusive(places: dict[str, Path]) -> None:
    found = scanned(places["innocent"], places["clean"], places["store"])
    assert found.judgement.verdict is Verdict.CLEAN
    assert found.found[1].top[0][1] == 0
    found = scanned(places["innocent"], None, places["store"])
    assert found.judgement.verdict is Verdict.INCONCLUSIVE
    assert found.count == SUSPECTS
    assert len(found.found[0].top) == chunks.TOP


def test_few_clean_images_are_no_null(places: dict[str, Path], tmp_path: Path) -> None:
    images = shapes().images
    few = Loaded(ImageSet(images[SUSPECTS : SUSPECTS + 40], None, (), "few"))
    found = scan.scan_pile(Loaded(ImageSet(patched(), None, (), "a")), few, executors=Serial, store=RunStore(tmp_path))
    assert found.judgement.verdict is Verdict.INCONCLUSIVE
    assert "give " in found.judgement.reasons[0]


def test_images_with_a_frequency_that_others_lack_are_found(places: dict[str, Path], tmp_path: Path) -> None:
    """As blto writes them to disk, marked as poisoned, in both layouts."""
    images = ImageSet(shapes().images[:SUSPECTS], np.arange(SUSPECTS, dtype=np.int64) % 4, tuple("abcd"), "shapes")
    trigger = FrequencyTrigger(magnitude=100, test_magnitude=100, window=32, positions=(15, 31))
    plan = plan_replacement(images.labels, num_classes=4, target_class=1, poison_rate=0.04, seed=0)
    poisoned = PoisonedDataset(images, plan, apply_to_uint8(trigger, images.images[plan.indices]))
    for layout in ("png", "parquet"):
        write_poisoned(poisoned, trigger, seeds={"select": 0}, out=tmp_path / layout, layout=layout)
        found = blto.scan_data(tmp_path / layout, clean=places["clean"], store=places["store"], quiet=True)
        assert found.judgement.verdict is Verdict.SUSPECT, layout
        assert found.leading.detector == "frequency_screening"
        rows = {int(Path(name.removeprefix("image ")).stem) for name, _ in found.leading.top[:16]}
        assert rows == set(plan.indices.tolist()), layout


def test_a_scan_is_made_once_and_kept(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scanned(places["patched"], places["clean"], tmp_path)

    def refuse(*given: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr("blto.audit.pile.working.score_chunk", refuse)
    again = scanned(places["patched"], places["clean"], tmp_path)
    assert without_times(again) == without_times(first)
    assert not list(tmp_path.rglob(".part-*"))
    name = places["patched"] / "0" / "00000.png"
    os.utime(name, ns=(name.stat().st_atime_ns, name.stat().st_mtime_ns))  # the same times, but touched
    with pytest.raises(BltoError, match="scored again"):
        scanned(places["patched"], places["clean"], tmp_path)


def test_the_size_of_the_parts_changes_nothing(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scanned(places["patched"], places["clean"], tmp_path / "one")
    monkeypatch.setattr(chunks, "IMAGES", 37)
    pieces = scanned(places["patched"], places["clean"], tmp_path / "many")
    assert pieces.found[1].top == whole.found[1].top
    assert pieces.judgement == whole.judgement


def test_files_that_change_while_they_are_read_are_noticed(places: dict[str, Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "pile", shapes().images[:60])
    source = Folder(folder)
    parts = source.parts(20)
    next(parts)
    (folder / "1" / "00059.png").write_bytes(b"other")
    with pytest.raises(InputRefused, match="its files changed while they were read"):
        list(parts)


def test_what_cannot_be_read_is_listed_and_left_out_where_that_is_permitted(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "pile", patched())
    damaged = (folder / "0" / "00002.png").read_bytes()
    (folder / "0" / "00002.png").write_bytes(damaged[:-20])
    (folder / "1" / "cat\x1b[2J.gif").write_bytes(b"GIF89a")
    os.mkfifo(folder / "1" / "pipe.png")
    (folder / "labels.json").write_text("{}")
    given = command(folder, places["clean"], tmp_path / "s")
    said = refused(capsys, *given, code=3)
    assert said.startswith(
        "blto: error[IMAGE-REFUSED]: 3 of 702 images cannot be read, the first: 0/00002.png: damaged"
    )
    assert "or give --skip-bad 3" in said
    (listing,) = (tmp_path / "s").rglob("unreadable.txt")
    lines = listing.read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "0/00002.png",
        "1/cat\\x1b[2J.gif",
        str(folder / "1/pipe.png"),
    ]
    assert main([*given, "--skip-bad", "2"]) == 3
    capsys.readouterr()
    assert main([*given, "--skip-bad", "3", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [name for name, _ in found["unreadable"]] == ["0/00002.png", "1/cat\x1b[2J.gif", "1/pipe.png"]
    assert found["count"] == SUSPECTS - 1
    assert found["notes"][0] == "pile: files beside the images were not read (1 .json)."
    assert found["notes"][1] == "3 images cannot be read and were left out."


def test_a_pile_of_files_that_are_no_images_ends_early(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pile").mkdir()
    for number in range(100):
        (tmp_path / "pile" / f"{number:03d}.bin").write_bytes(b"no image")
    with pytest.raises(InputRefused, match="no image in it can be read"):
        scanned(tmp_path / "pile", None, tmp_path / "s")
    monkeypatch.setattr("blto.audit.pile.working.LISTED", 10)
    monkeypatch.setattr(chunks, "IMAGES", 8)
    begun = []

    def counting(content: Any, tell: Any) -> Any:
        begun.append(1)
        return score_chunk(content, tell)

    monkeypatch.setattr("blto.audit.pile.working.score_chunk", counting)
    write(tmp_path / "pile", shapes().images[:40])
    with pytest.raises(InputRefused, match=r"\d+ of 440 images cannot be read"):
        scanned(tmp_path / "pile", places["clean"], tmp_path / "s", skip_bad=1)
    assert len(begun) < 12, "of 55"


def test_clean_images_that_are_stored_in_another_way_are_no_null(places: dict[str, Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "jpeg", shapes().images[:SUSPECTS], lambda pixels: encode_jpeg(pixels, 90))
    found = scanned(folder, places["clean"], tmp_path / "s")
    assert found.judgement.verdict is Verdict.INCONCLUSIVE
    assert "100% of the suspects are stored as JPEG, of them 0%" in found.judgement.reasons[0]


def test_a_kind_is_told_by_storage_and_size() -> None:
    def summary(size: tuple[int, int], most: tuple[int, int] | None = None, **stored: int) -> Summary:
        return Summary(least=size, most=most or size, stored=Counter(stored))

    base = summary((32, 32), JPEG=100)
    assert unlike(base, base) is None
    assert unlike(base, summary((32, 32), JPEG=95, WebP=5)) is None
    assert "stored as" in str(unlike(base, summary((32, 32), JPEG=85, WebP=15)))
    assert "they are of 48x32 pixels, the suspects of 32x32 pixels" in str(unlike(base, summary((32, 48), JPEG=9)))
    several = summary((32, 32), (64, 64), JPEG=9)
    assert "of several sizes" in str(unlike(base, several))
    assert unlike(several, summary((10, 10), (90, 90), JPEG=9)) is None


def test_a_drill_poisons_clean_images_and_counts_what_is_found(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drill, "RUNS", 2)
    monkeypatch.setattr("blto.audit.pile.working.RUNS", 2)
    found = scanned(places["innocent"], places["clean"], places["store"], drill=0.1)
    assert [(each.attack, each.runs, each.found) for each in found.drills] == [("SSL-Backdoor", 2, 2), ("CTRL", 2, 2)]
    assert (found.drills[0].suspects, found.drills[0].clean) == (150, 150 - 37)
    assert found.judgement.verdict is Verdict.CLEAN
    weak = scanned(places["innocent"], places["clean"], places["store"], drill=0.007)
    assert weak.drills[0].found == 0
    assert weak.judgement.verdict is Verdict.INCONCLUSIVE
    with pytest.raises(ConfigError, match=r"--drill 0.001: less than one of 150 images"):
        scanned(places["innocent"], places["clean"], places["store"], drill=0.001)


def test_what_learns_from_clean_images_alone_and_what_from_all_share_none() -> None:
    screens = build_screens(["frequency_screening", {"name": "repeated_windows", "sample": 10_000}])
    (none, apart), (suspects, clean) = syllabus(screens, 300, 200, 32, 0)
    assert (len(none), len(apart)) == (0, 50)
    assert suspects.tolist() == list(range(300))
    assert sorted([*clean, *apart]) == list(range(200)), "all others"
    screens = build_screens(
        [{"name": "frequency_screening", "reference": 20}, {"name": "repeated_windows", "sample": 99}]
    )
    (none, apart), (suspects, clean) = syllabus(screens, 300, 200, 32, 1)
    assert (len(apart), len(suspects) + len(clean)) == (20, 99)
    assert not set(apart) & set(clean)
    assert (np.diff(np.concatenate([suspects, 300 + clean])) > 0).all()
    (alone, none), _ = syllabus(screens, 300, 0, 32, 1)
    assert (len(alone), len(none)) == (20, 0), "suspects stand in"


def test_the_attacks_of_a_drill_fit_images_of_any_size() -> None:
    for size in (8, 32, 50, 224):
        for attack in drill.attacks_for(size):
            assert drill._trigger(attack, size, 0) is not None


def test_summaries_add_up_in_any_grouping() -> None:
    def summary(seed: int) -> Summary:
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, 9, 80).tolist()
        top = sorted(((float(score), f"{seed}/{n}") for n, score in enumerate(scores)), key=lambda e: (-e[0], e[1]))
        return Summary(
            80,
            1,
            [(f"{seed}", "bad")],
            [Counter(scores)],
            [top],
            Counter(PNG=80),
            (5 + seed, 7),
            (9, 9 + seed),
            "",
            [0.5],
        )

    one, two, three = (summary(seed) for seed in range(3))
    left, right = added(added(one, two), three), added(one, added(two, three))
    left.digest = right.digest = ""
    assert left == right
    assert len(left.tops[0]) == chunks.TOP
    assert (left.count, left.refused, left.least, left.most) == (240, 3, (5, 7), (9, 11))
    assert Summary.from_json(json.loads(json.dumps(left.as_json()))) == left
    assert added(nothing(1), one).histograms == one.histograms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "--alpha is 0; give a share"),
        ({"drill": 1.0}, "--drill is 1; give the share of images"),
        ({"drill": -0.1}, "--drill is -0.1; give the share"),
        ({"skip_bad": -1}, "--skip-bad is -1; give 0 or more"),
        ({"detectors": ["spectral"]}, "--detector spectral: it cannot scan images a few at a time; give frequency_scr"),
        ({"detectors": ["repeated_windows", {"name": "repeated_windows", "window": 7}]}, "one is given twice"),
        ({"detectors": [{"name": "repeated_windows", "window": 1}]}, "--detector.window: "),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, Any], message: str, places: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        scanned(places["patched"], places["clean"], places["store"], **options)


def test_a_drill_needs_clean_images_and_they_are_not_the_suspects(places: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"--drill 0.1 poisons clean images, and there are none"):
        scanned(places["patched"], None, places["store"], drill=0.1)
    with pytest.raises(ConfigError, match=r"--clean: patched is what is to be scanned"):
        scanned(places["patched"], places["patched"], places["store"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clean", "nowhere"], "error[NO-DATA]: nowhere: no such folder; give one with images in it"),
        (["--clean", "{name: nothing}"], 'unknown dataset "nothing"'),
        (["--workers", "2"], "--workers is 2, but the serial executor has one"),
        (["--executor", "processes", "--workers", "999"], "--workers is 999, but"),
        (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1: only for a Ray cluster; add --executor ray"),
        (["--executor", "ray", "--workers", "0"], "--workers is 0; give 1 or more"),
        (["--executor", "ray", "--address", "127.0.0.1:1"], "--address 127.0.0.1:1: no Ray cluster answers there"),
        (["--executor", "ray", "--address", "nobody"], "--address nobody: no Ray cluster answers there"),
    ],
)
def test_the_command_refuses_in_one_line(
    more: list[str], message: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if "ray" in more and "--address" in more:
        pytest.importorskip("ray")
    assert message in refused(capsys, *command(places["patched"], None, places["store"], *more))


def test_too_few_images_are_refused(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write(tmp_path / "few", shapes().images[:9])
    (tmp_path / "none").mkdir()
    for pile, clean, message in (
        (few, places["clean"], "few: 9 images, and the detectors need 10; give more"),
        (places["patched"], few, "few: 9 images, and the detectors need 40; give more"),
        (tmp_path / "none", few, "none: no image in it; give a folder with"),
    ):
        assert message in refused(capsys, *command(pile, clean, tmp_path / "s"), code=3)


def test_without_ray_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(on_ray, "import_module", absent)
    with pytest.raises(ConfigError, match=r"Ray is not installed; run pip install 'blto\[ray\]'"):
        build_executor("ray", score_chunk, known=WITH_RAY)
    with pytest.raises(ConfigError, match='unknown executor "ray"'):
        build_executor("ray", score_chunk)


def test_the_command_writes_page_sarif_and_json_and_leaves_with_the_verdict(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pile = write(tmp_path / "<b>pile", patched())
    page, sarif = tmp_path / "scan.html", tmp_path / "scan.sarif"
    given = command(pile, places["clean"], tmp_path / "s")
    assert main([*given, "--page", str(page), "--sarif", str(sarif)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("<b>pile: suspect, p = ")
    assert "most suspicious (Repeated windows): 0/00000.png (19)" in said
    assert "not tested: " in said
    text = page.read_text()
    assert "&lt;b&gt;pile" in text
    assert "<b>pile" not in text
    assert "<script" not in text
    assert text.count("data:image/png;base64,") == 40 + SUSPECTS // EVERY, "what has a score of 0 is not shown"
    document = json.loads(sarif.read_text())
    assert problems(document) == []
    (run,) = document["runs"]
    (entry,) = run["results"]
    assert (entry["ruleId"], entry["level"]) == ("data-poisoned", "warning")
    uris = [each["physicalLocation"]["artifactLocation"]["uri"] for each in entry["relatedLocations"]]
    assert uris[0] == "%3Cb%3Epile/0/00000.png"
    assert len(uris) == 20
    assert main([*given, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["count"]) == ("suspect", SUSPECTS)
    assert found["sha256"] == run["artifacts"][0]["hashes"]["sha-256"]
    assert len(found["detectors"][1]["levels"]) >= 1


def test_the_exit_codes_are_the_verdicts_and_data_sets_have_names(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = "{name: synthetic, train_size: 300, test_size: 200}"
    assert main(command(made, made, tmp_path)) == 0
    assert ": clean, p = " in capsys.readouterr().out
    assert main(command(made, None, tmp_path, "--sarif", str(tmp_path / "a.sarif"))) == 8
    assert ": inconclusive" in capsys.readouterr().out
    document = json.loads((tmp_path / "a.sarif").read_text())
    assert problems(document) == []
    assert [each["ruleId"] for each in document["runs"][0]["results"]] == ["data-inconclusive"]


def test_a_link_out_of_the_folder_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "pile", shapes().images[:20])
    (folder / "0" / "link.png").symlink_to("/etc/passwd")
    with pytest.raises(InputRefused, match=r"link.png: a link to a folder, or out of"):
        Folder(folder)
