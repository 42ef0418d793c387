"""Legacy pickles are read in a process that is thrown away, behind whatever walls the system can put up.

The file's bytes go in through memory, safetensors come back through a pipe, and the parent checks those like any other
file. The interpreter in the child runs nothing (`pickles`); the walls are for the day on which it does.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from blto.errors import InputRefused
from blto.files.atomic import canonical_json
from blto.files.foreign.groups import MOST_SHARED
from blto.files.foreign.legacy import LegacyCheckpoint
from blto.files.foreign.pickles import CodeFoundError, RefusedError
from blto.files.reading import parse_json
from blto.files.safetensors import parse_safetensors
from blto.files.text import show

Array = npt.NDArray[Any]

SECONDS_OF_CPU = 120
ROOM = 1 << 30
"""Bytes of address space that the child has beside thrice the file."""
OVERHEAD = 16 << 20
"""Bytes that its answer may have beside the tensors."""
REFUSED, ESCAPED, OUT_OF_ROOM, HOLDS_CODE = 3, 4, 5, 6
WALLS = ("address space", "CPU time", "file size", "no core", "no network", "no new privileges", "watched")
_CLONE_NEWNET, _CLONE_NEWUSER, _PR_SET_NO_NEW_PRIVS = 0x40000000, 0x10000000, 38
_FORBIDDEN = (
    *("exec", "compile", "import", "open", "os.", "socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "signal."),
    *("pickle.", "marshal.", "mmap.", "resource.", "code.", "function.", "tempfile.", "urllib."),
)


def convert(data: bytes) -> tuple[dict[str, dict[str, Array]], tuple[str, ...]]:
    """The tensors of a legacy checkpoint by group and name, and which of `WALLS` stood around the process that read it.

    Raises:
        RefusedError: the process refused it, was stopped by a wall, or gave back something else than it should.
    """
    code, answer, said = _run(data)
    if code == REFUSED:
        raise RefusedError(said or "it was refused")
    if code == HOLDS_CODE:
        raise CodeFoundError(said or "it holds code")
    if code == OUT_OF_ROOM:
        raise RefusedError("reading it takes more memory than such a file needs")
    if code == ESCAPED:
        raise CodeFoundError("the process that read it was stopped (it tried what no reading needs)")
    if code != 0:
        raise RefusedError(f"the process that read it was stopped ({_ending(code)})")
    try:
        flat, metadata = parse_safetensors(answer, "the answer")
        groups: dict[str, dict[str, Array]] = {}
        for number, (group, name) in enumerate(parse_json(metadata["places"].encode(), "the answer")):
            if type(group) is not str or type(name) is not str:
                raise ValueError("names are texts")
            groups.setdefault(group, {})[name] = flat[str(number)]
        walls = parse_json(metadata["walls"].encode(), "the answer")
        return groups, tuple(wall for wall in WALLS if wall in walls)
    except (InputRefused, KeyError, TypeError, ValueError) as error:
        raise RefusedError("the process that read it gave no tensors back") from error


def _run(data: bytes) -> tuple[int, bytes, str]:
    """Exit code, answer and last words of a child that reads `data`; it and whatever it started are killed."""
    program = f"import sys; sys.path[:0] = {_search_path()!r}; from blto.files.foreign.sandbox import serve; serve()"
    surroundings = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    surroundings |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with os.fdopen(os.memfd_create("checkpoint"), "r+b") as given:
        given.write(data)
        given.seek(0)
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", program],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=surroundings,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise RefusedError(f"no process to read it in could be started ({error.strerror})") from error
    with child:
        clock = Timer(2 * SECONDS_OF_CPU, lambda: _end(child))
        clock.start()
        try:
            assert child.stdout is not None  # pipes were asked for
            assert child.stderr is not None
            most = MOST_SHARED * len(data) + OVERHEAD
            answer = child.stdout.read(most + 1)
            if len(answer) > most:
                raise RefusedError("the process that read it gave back more than it was given")
            said = child.stderr.read(4096).decode(errors="replace").strip().rpartition("\n")[2]
            return child.wait(), answer, show(said, 140)
        finally:
            clock.cancel()
            _end(child)


def _search_path() -> list[str]:
    """Where the child finds this package, NumPy and safetensors, wherever this process has found them."""
    return [str(Path(__file__).parents[3]), *(entry for entry in sys.path if entry and Path(entry).is_dir())]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and its whole session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code}"


def serve() -> NoReturn:
    """The child's life: read standard input, put up the walls, answer on standard output."""
    data = sys.stdin.buffer.read()
    code = REFUSED
    try:
        walls = put_up_walls(len(data))
        answer(LegacyCheckpoint(data), walls, sys.stdout.buffer.write)
        sys.stdout.buffer.flush()
        code = 0
    except RefusedError as error:
        os.write(2, str(error).encode())
        code = HOLDS_CODE if isinstance(error, CodeFoundError) else REFUSED
    except MemoryError:
        code = OUT_OF_ROOM
    except BaseException as error:  # whatever a damaged file leads to, in one line
        os.write(2, f"damaged ({show(error, 80)})".encode())
    os._exit(code)


def answer(opened: LegacyCheckpoint, walls: list[str], write: Callable[[bytes | memoryview], Any]) -> None:
    """Write the tensors as safetensors, one after the other, so that there is never a second copy of them all."""
    places = [(group, name) for group, of in opened.groups.items() for name in of]
    header: dict[str, Any] = {"__metadata__": {"places": json.dumps(places), "walls": json.dumps(walls)}}
    end = 0
    for number, (group, name) in enumerate(places):
        tensor = opened.groups[group][name]
        spans = {"data_offsets": [end, end + tensor.nbytes], "shape": list(tensor.shape)}
        header[str(number)] = {"dtype": tensor.storage.spelled, **spans}
        end += tensor.nbytes
    encoded = canonical_json(header)
    write(len(encoded).to_bytes(8, "little") + encoded)
    for group, name in places:
        write(np.ascontiguousarray(opened.take(opened.groups[group][name])).tobytes())


def put_up_walls(size: int) -> list[str]:
    """Limit this process; names what could be put up."""
    warm_up()
    standing = []
    libc = ctypes.CDLL(None, use_errno=True)
    with suppress(OSError, AttributeError):
        if libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
            standing.append("no network")
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            standing.append("no new privileges")
    for name, limit, most in (
        ("address space", resource.RLIMIT_AS, 3 * size + ROOM),
        ("CPU time", resource.RLIMIT_CPU, SECONDS_OF_CPU),
        ("file size", resource.RLIMIT_FSIZE, 0),
        ("no core", resource.RLIMIT_CORE, 0),
    ):
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (most, most))
            if resource.getrlimit(limit) == (most, most):
                standing.append(name)
    sys.addaudithook(_watch)
    return [*standing, "watched"]


def warm_up() -> None:
    """Load what reading needs and Python loads late, before nothing more may be loaded."""
    for codec in ("raw-unicode-escape", "unicode-escape", "latin-1", "ascii", "utf-8"):
        b"x".decode(codec, "surrogatepass" if codec == "utf-8" else "strict")
    np.ascontiguousarray(np.lib.stride_tricks.as_strided(np.zeros(1), (1,), (8,))).tobytes()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Leave at once where something that reading does not need is tried."""
    if event.startswith(_FORBIDDEN):
        os._exit(ESCAPED)
