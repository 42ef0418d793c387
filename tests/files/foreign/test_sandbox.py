"""The process that reads legacy checkpoints: what it may not do, and what its parent makes of its death."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blto.files.foreign import sandbox
from tests.files.foreign.made import read, refusal, saved


def test_a_legacy_file_is_read_behind_walls_in_a_process_without_torch(tmp_path: Path) -> None:
    found = read(tmp_path, saved({"a": torch.ones(1)}, legacy=True))
    assert {"address space", "CPU time", "file size", "no core", "no new privileges", "watched"} <= set(found.layers)
    program = "import sys; import blto.files.foreign.sandbox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


ATTEMPTS = [
    "open('{0}', 'w')",
    "import os; os.system('touch {0}')",
    "import os; os.open('{0}', os.O_CREAT)",
    "import subprocess; subprocess.run(['touch', '{0}'])",
    "import socket; socket.socket()",
    "eval('1')",
    "import json.tool",
    "import os; os.fork()",
]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_whoever_tries_more_than_reading_is_ended(tmp_path: Path, attempt: str) -> None:
    line = attempt.format(tmp_path / "PWNED")
    program = f"from blto.files.foreign.sandbox import put_up_walls\nput_up_walls(0)\n{line}\nprint('done')"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (sandbox.ESCAPED, b"")
    assert not (tmp_path / "PWNED").exists()


UNWATCHED = """
import os, socket, sys
from blto.files.foreign import sandbox
sys.addaudithook = lambda hook: None
walls = sandbox.put_up_walls(0)
tries = {
    "address space": lambda: bytearray(2 << 30),
    "file size": lambda: os.write(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), b"x"),
    "no network": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=5),
}
for wall, attempt in tries.items():
    if wall in walls:
        try:
            attempt()
            print("no wall:", wall)
        except (MemoryError, OSError):
            print("held:", wall)
"""


def test_each_wall_that_is_named_stands_alone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = [sys.executable, "-c", UNWATCHED, str(tmp_path / "f"), str(server.getsockname()[1])]
        done = subprocess.run(given, check=False, capture_output=True, text=True)
    assert "no wall" not in done.stdout
    assert {"held: address space", "held: file size"} <= set(done.stdout.splitlines())


def test_a_wall_that_cannot_be_put_up_is_not_named() -> None:
    program = (
        "import resource\nfrom blto.files.foreign import sandbox\n"
        "def fail(*given): raise OSError\n"
        "resource.setrlimit = fail\nprint(*sandbox.put_up_walls(0), sep=', ')"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.stdout.strip().endswith("watched")
    assert not {"address space", "CPU time", "file size", "no core"} & set(done.stdout.strip().split(", "))


def test_a_child_that_dies_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved({"a": torch.ones(1)}, legacy=True)
    for program, said in (
        ("import ctypes; ctypes.string_at(0)", "signal 11"),
        ("import os; os._exit(4)", "it tried what no reading needs"),
        ("import os; os._exit(9)", "exit code 9"),
        ("print('nonsense')", "gave no tensors back"),
        ("import sys; sys.stdout.buffer.write(bytes(1 << 26))", "gave back more than it was given"),
    ):
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -X faulthandler=0 -c "{program}"\n')
        script.chmod(0o755)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", str(script))
            assert said in refusal(tmp_path, data)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert "no process to read it in could be started" in refusal(tmp_path, data)
