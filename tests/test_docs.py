"""What the documentation says is what the code has: options, metrics, exit codes, links."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from blto import errors

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_page_of_blto_names_every_option() -> None:
    from blto.attacks.bilevel_spec import BilevelSpec
    from blto.attacks.blto import BLTO

    page = (ROOT / "docs/attacks/blto.md").read_text()
    named = set(re.findall(r"`([\w.]+)`", page))
    assert {f"bilevel.{key}" for key in BilevelSpec.model_fields} <= named
    assert set(BLTO.__init__.__annotations__) - {"return", "bilevel"} <= named
    assert {key for key in named if key.startswith("bilevel.")} <= {
        f"bilevel.{key}" for key in BilevelSpec.model_fields
    }


@pytest.mark.parametrize("name", ["bad_encoder", "ctrl", "ssl_backdoor"])
def test_the_page_of_an_attack_names_every_option(name: str) -> None:
    from blto.attacks import ATTACKS

    page = (ROOT / f"docs/attacks/{name}.md").read_text()
    assert set(ATTACKS.schema(name).model_fields) <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


def test_every_defense_has_a_page_that_names_its_options() -> None:
    from blto.defenses import DEFENSES

    for name in DEFENSES.names():
        page = DEFENSES.get(name).__module__.rpartition(".")[2]  # three recipe changes share theirs
        named = set(re.findall(r"`(\w+)(?:\.\w+)?`", (ROOT / f"docs/defenses/{page}.md").read_text()))
        assert {name, *DEFENSES.schema(name).model_fields} - named <= {page}
        assert f"({page}.md)" in (ROOT / "docs/defenses/README.md").read_text()


@pytest.mark.parametrize("name", ["encoder", "data"])
def test_the_page_of_the_scan_names_every_option(name: str) -> None:
    from typer.main import get_command

    from blto.cli.app import app

    page = (ROOT / "docs/scan.md").read_text()
    command = vars(vars(get_command(app))["commands"]["scan"])["commands"][name]
    options = {word for each in command.params for word in each.opts if word[:2] == "--"}
    shared = {"--store", "--data-root", "--device", "--quiet", "--help", "--seed"}
    assert not {option for option in options - shared if option not in page}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_in_the_repository_is_one(path: Path) -> None:
    from blto.configuration import read_specs

    assert read_specs(path, [], None)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_sweep_in_the_repository_is_one(path: Path) -> None:
    from blto.sweep.plan import read_sweep

    assert read_sweep(path)


def test_the_page_of_sweeps_names_every_key_and_option() -> None:
    from typer.main import get_command

    from blto.cli.app import app
    from blto.sweep.plan import CellEntry, SweepFile

    page = (ROOT / "docs/sweeps.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert listed == set(SweepFile.model_fields)
    assert all(f"`{key}`" in page for key in CellEntry.model_fields)
    shared = {"--store", "--data-root", "--device", "--quiet", "--help"}
    command = vars(get_command(app))["commands"]["sweep"]
    options = {word for each in command.params for word in each.opts if word[:2] == "--"}
    assert not {option for option in options - shared if option not in page}


def test_the_metrics_page_defines_every_metric() -> None:
    from blto.evaluation.metrics import METRIC_NAMES

    page = (ROOT / "docs/metrics.md").read_text()
    assert set(METRIC_NAMES) <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


def test_the_readme_lists_every_exit_code() -> None:
    from blto.audit.verdict import Verdict

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BltoError)]
    table = (ROOT / "README.md").read_text().partition("| exit code |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    listed = {int(code) for row in rows for code in row.split(",")}
    verdicts = {verdict.exit_code for verdict in Verdict}
    assert listed == {kind.exit_code for kind in kinds} | verdicts | {0, 143}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_make_clean_removes_the_caches_of_the_folders_that_there_are(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    removed = [tmp_path / name for name in (".venv", "src/a/__pycache__", "tests/__pycache__")]
    kept = [tmp_path / name for name in ("runs", "src/a/b", "benchmarks")]
    for folder in removed + kept:
        folder.mkdir(parents=True)
    done = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not [folder for folder in removed if folder.exists()]
    assert all(folder.exists() for folder in kept)
