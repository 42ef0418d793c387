"""Legacy pickles are read in a process that is thrown away: it can neither write, nor connect, nor grow.

The file's bytes go in through one pipe, safetensors come back through another, and the parent checks those like any
other file. The interpreter in it runs nothing (`pickles`); the walls are for the day on which it does.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from blto.errors import InputRefused
from blto.files.foreign.legacy import LegacyCheckpoint
from blto.files.foreign.pickles import RefusedError
from blto.files.safetensors import encode_safetensors, parse_safetensors
from blto.files.text import show

Array = npt.NDArray[Any]

SECONDS_OF_CPU = 120
ROOM = 1 << 30  # bytes of address space beside thrice the file
REFUSED, ESCAPED = 3, 4
_CLONE_NEWNET, _CLONE_NEWUSER, _PR_SET_NO_NEW_PRIVS = 0x40000000, 0x10000000, 38
_FORBIDDEN = ("exec", "compile", "import", "open", "os.", "socket.", "subprocess.", "ctypes.", "shutil.", "pty.")


def convert(data: bytes) -> tuple[dict[str, dict[str, Array]], tuple[str, ...]]:
    """The tensors of a legacy checkpoint by group and name, and which walls stood around the process that read it.

    Raises:
        RefusedError: the process refused it, was stopped by a wall, or gave back something else than it should.
    """
    root = str(Path(__file__).parents[3])
    program = f"import sys; sys.path.insert(0, {root!r}); from blto.files.foreign.sandbox import serve; serve()"
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    child = subprocess.Popen(
        [sys.executable, "-I", "-B", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=one_thread,
        cwd="/",
        close_fds=True,
        start_new_session=True,
    )
    try:
        answer, said = child.communicate(data, timeout=2 * SECONDS_OF_CPU)
    except subprocess.TimeoutExpired:
        raise RefusedError("reading it took too long") from None
    finally:
        child.kill()
        child.wait()
    if child.returncode == REFUSED:
        raise RefusedError(said.decode(errors="replace").strip() or "it was refused")
    if child.returncode != 0:
        raise RefusedError(f"the process that read it was stopped ({_ending(child.returncode)})")
    try:
        flat, metadata = parse_safetensors(answer, "the answer")
        places = json.loads(metadata["places"])
        groups: dict[str, dict[str, Array]] = {}
        for number, (group, name) in enumerate(places):
            groups.setdefault(str(group), {})[str(name)] = flat[str(number)]
        return groups, tuple(map(str, json.loads(metadata["walls"])))
    except (InputRefused, KeyError, TypeError, ValueError) as error:
        raise RefusedError("the process that read it gave no tensors back") from error


def _ending(code: int) -> str:
    return (
        "it tried what no reading needs" if code == ESCAPED else f"exit code {code}" if code > 0 else f"signal {-code}"
    )


def serve() -> NoReturn:
    """The child's life: read standard input, put up the walls, answer on standard output."""
    data = sys.stdin.buffer.read()
    code = REFUSED
    try:
        walls = put_up_walls(len(data))
        opened = LegacyCheckpoint(data)
        places = [(group, name) for group, of in opened.groups.items() for name in of]
        flat = {str(number): opened.take(opened.groups[group][name]) for number, (group, name) in enumerate(places)}
        metadata = {"places": json.dumps(places), "walls": json.dumps(walls)}
        sys.stdout.buffer.write(encode_safetensors(flat, metadata))
        sys.stdout.buffer.flush()
        code = 0
    except RefusedError as error:
        os.write(2, str(error).encode())
    except BaseException as error:  # whatever a damaged file leads to, in one line
        os.write(2, f"damaged ({show(error, 80)})".encode())
    os._exit(code)


def put_up_walls(size: int) -> list[str]:
    """Limit this process for good; names what could be put up."""
    np.lib.stride_tricks.as_strided(np.zeros(1), (1,), (8,))  # what is needed is loaded before nothing more may be
    walls = ["address space", "CPU time", "no files", "no core"]
    libc = ctypes.CDLL(None, use_errno=True)
    with suppress(OSError, AttributeError):
        if libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
            walls.append("no network")
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            walls.append("no new privileges")
    room = 3 * size + ROOM
    for limit, most in (
        (resource.RLIMIT_AS, room),
        (resource.RLIMIT_CPU, SECONDS_OF_CPU),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (most, most))
    sys.addaudithook(_watch)
    return [*walls, "watched"]


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Leave at once where anything but reading is tried."""
    if event.startswith(_FORBIDDEN):
        os._exit(ESCAPED)
