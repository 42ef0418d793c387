"""The error contract: one line, the right exit code, no traceback, whatever went wrong and whoever reads along."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blto import errors
from blto.cli.guard import guarded


def run(
    action: Callable[[], int | None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...] = (),
) -> tuple[int, str]:
    """Exit code and standard error of a guarded action."""
    code = guarded(action, arguments, crash_folder=tmp_path / "runs")
    return code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], int | None]:
    def action() -> int | None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            errors.ConfigError("a.yaml:3: seed: wrong.\n Give a number."),
            2,
            "error[CONFIG]: a.yaml:3: seed: wrong. Give a number.",
        ),
        (
            errors.InputRefused("x.png: not an image.", code="IMAGE-REFUSED"),
            3,
            "error[IMAGE-REFUSED]: x.png: not an image.",
        ),
        (errors.ResourceExhausted("runs/a: no room."), 4, "error[DISK-FULL]: runs/a: no room."),
        (errors.Busy("runs/a: in use by pid 7."), 5, "error[BUSY]: runs/a: in use by pid 7."),
        (errors.Mismatch("set: image 3 differs."), 6, "error[MISMATCH]: set: image 3 differs."),
        (errors.Diverged("NaN at step 5."), 7, "error[DIVERGED]: NaN at step 5."),
        (errors.Interrupted("stopped at step 5.", signal_number=15), 143, "error[INTERRUPTED]: stopped at step 5."),
        (MemoryError(), 4, "error[OUT-OF-MEMORY]: not enough memory; lower the batch size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB"),
            4,
            "error[OUT-OF-MEMORY]: not enough memory",
        ),
        (errors.ConfigError("bad \x1b[2J\u202ename"), 2, r"error[CONFIG]: bad \x1b[2J\u202ename"),
    ],
)
def test_every_kind_of_error_is_one_line_with_its_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    got, err = run(raising(error), capsys, tmp_path)
    assert got == code
    assert err.startswith(f"blto: {line}")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert not (tmp_path / "runs").exists()


def test_every_error_class_has_a_code_of_the_contract() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BltoError)]
    assert {kind.__name__: kind.exit_code for kind in kinds} == {
        "BltoError": 70,
        "ConfigError": 2,
        "InputRefused": 3,
        "ResourceExhausted": 4,
        "Busy": 5,
        "Mismatch": 6,
        "Diverged": 7,
        "Interrupted": 130,
    }


def test_a_long_message_keeps_its_start_and_its_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, err = run(raising(errors.ConfigError("start " + "x" * 5000 + " end")), capsys, tmp_path)
    assert err.startswith("blto: error[CONFIG]: start ")
    assert err.endswith(" end\n")
    assert len(err) <= 301


def test_a_bug_is_one_line_and_a_crash_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, err = run(raising(KeyError("\x1b[31mweight")), capsys, tmp_path, ("run", "a.yaml"))
    assert code == 70
    assert re.fullmatch(
        r"blto: error\[BUG\]: KeyError: .*weight.* bug in blto\. Details are in .*crash-\w{8}\.txt.*\n", err
    )
    assert "\x1b" not in err
    assert "Traceback" not in err
    (crash,) = (tmp_path / "runs").iterdir()
    text = crash.read_text()
    assert "Traceback" in text
    assert "blto run a.yaml" in text


def test_a_bug_where_nothing_can_be_written_still_ends_with_70(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("a file, not a folder")
    code, err = run(raising(KeyError("x")), capsys, tmp_path)
    assert code == 70
    assert "could not be written" in err


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("run", "my config.yaml"), "Go on with: blto run 'my config.yaml' --resume"),
        (("run", "a.yaml", "--resume"), "Go on with: blto run a.yaml --resume"),
        (("show", "blto"), ""),
    ],
)
def test_an_interruption_names_the_command_that_goes_on(
    arguments: tuple[str, ...], advice: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, err = run(raising(KeyboardInterrupt()), capsys, tmp_path, arguments)
    assert code == 130
    assert err.rstrip("\n").endswith(advice or "are kept.")


SLEEPER = """
import sys, time
from blto.cli.guard import guarded
def action():
    print("ready", flush=True)
    time.sleep(30)
sys.exit(guarded(action, ["run", "a.yaml"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_code_and_one_line(number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        started = time.monotonic()
        child.send_signal(number)
        _, err = child.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert child.returncode == code
    assert err.startswith("blto: error[INTERRUPTED]: stopped;")
    assert err.endswith("Go on with: blto run a.yaml --resume\n")
    assert err.count("\n") == 1


TALKER = """
import sys
from blto.cli.guard import guarded
def action():
    for _ in range(int(sys.argv[2])):
        sys.stdout.write("a result\\n")
        sys.stderr.write("progress\\n")
    open(sys.argv[1], "w").write("the work was done")
sys.exit(guarded(action, []))
"""


def talk(marker: Path, shell: str, lines: int = 20_000) -> subprocess.CompletedProcess[str]:
    """Run a talkative action under a shell redirection; its own exit code is what the shell returns."""
    script = f'set -o pipefail; "$0" -c "$1" "$2" {lines} {shell}'
    command = ["bash", "-c", script, sys.executable, TALKER, os.fspath(marker)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=buffered)


@pytest.mark.parametrize("shell", ["| head -1", "2>&1 | head -1", "2>/dev/full"])
def test_work_goes_on_when_nobody_reads(shell: str, tmp_path: Path) -> None:
    done = talk(tmp_path / "marker", shell)
    assert (tmp_path / "marker").read_text() == "the work was done"
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("lines", [1, 20_000])  # one line still sits in the buffer when the command has ended
def test_a_full_device_on_standard_output_is_told_after_the_work(lines: int, tmp_path: Path) -> None:
    done = talk(tmp_path / "marker", ">/dev/full", lines)
    assert (tmp_path / "marker").read_text() == "the work was done"
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1].startswith("blto: error[DISK-FULL]: standard output: cannot be written")
    assert "Exception ignored" not in done.stderr


def test_an_ascii_terminal_gets_escapes_and_not_a_crash(tmp_path: Path) -> None:
    code = "import sys; from blto.cli.guard import guarded; sys.exit(guarded(lambda: print('caf\\u00e9'), []))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n")
