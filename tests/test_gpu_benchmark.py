"""The benchmark for a GPU owner, as far as a machine without a GPU can run it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def bash(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    given = [shutil.which("bash") or "bash", *arguments]
    return subprocess.run(
        given, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_script_parses() -> None:
    done = bash("-n", str(SCRIPT), path=os.environ["PATH"])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("answer", [None, "exit 9", "echo No devices were found"])
def test_without_a_gpu_it_says_so_in_one_line_and_installs_nothing(answer: str | None, tmp_path: Path) -> None:
    """nvidia-smi is missing, fails, or lists nothing; `make` would leave a mark."""
    for name, body in (("nvidia-smi", answer), ("make", f"touch {tmp_path / 'installed'}")):
        if body:
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
    for name in ("sh", "grep", "dirname", "echo", "touch"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    done = bash(str(SCRIPT), path=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "gpu.sh: nvidia-smi lists no GPU; run this on a machine with an NVIDIA GPU and its driver."
    ]
    assert not (tmp_path / "installed").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_turn_of_each_candidate_runs_on_the_cpu(bf16: bool) -> None:
    found = gpu.training(gpu.noise(16), 4, 8, bf16=bf16, device="cpu", steps=1, rounds=3)
    assert found["title"] == f"ResNet-18 width 4, batch 8, {'bf16' if bf16 else 'fp32'}"
    assert set(found["rates"]) == {"ours", gpu.OTHER}
    assert {turn["images"] for turns in found["turns"].values() for turn in turns} == {8}
    assert found["ratio"]["ratio"] > 0
