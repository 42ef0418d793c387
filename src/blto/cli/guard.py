"""The error contract of the command line: one line on standard error, the right exit code, and nothing else.

    blto: error[CODE]: <file or key>: <what is wrong>. <what to do>.

A mistake of the user's is a `BltoError` with its own exit code. Anything unforeseen is a bug of ours: exit 70, one
line, and the traceback in a crash file. Ctrl-C and SIGTERM end with 130 and 143 and the command that goes on. Output
that nobody reads (`| head`, a full disk) never ends a training.
"""

from __future__ import annotations

import errno
import os
import platform
import secrets
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

from blto.errors import BltoError, ConfigError, Interrupted, ResourceExhausted, out_of_memory
from blto.files.atomic import write_text
from blto.files.text import show

INTERRUPTED = Interrupted.exit_code
BUG = BltoError.exit_code
_LINE_LIMIT = 300


def guarded(action: Callable[[], int | None], arguments: Sequence[str], *, crash_folder: Path = Path("runs")) -> int:
    """Run one command and return its exit code, with every error printed as the contract says.

    Args:
        action: the command; returns its exit code, None being 0.
        arguments: of the command line, for the command that resumes an interrupted run.
        crash_folder: where the traceback of a bug goes.
    """
    with forgiving_streams() as (out, _), termination_as_interrupt() as received:
        try:
            code = action() or 0
        except BaseException as error:
            code = _explain(error, arguments, received, crash_folder)
        else:
            if code == INTERRUPTED:  # the command-line library turns KeyboardInterrupt into this code
                code = _explain(KeyboardInterrupt(), arguments, received, crash_folder)
        out.flush()
        if out.error is not None and out.error.errno != errno.EPIPE and code == 0:
            reason = out.error.strerror or "unknown reason"
            full = ResourceExhausted(
                f"standard output: cannot be written ({reason}); results that were saved are whole."
            )
            code = _print_error(full.code, str(full), full.exit_code)
    return code


def _explain(error: BaseException, arguments: Sequence[str], received: list[int], crash_folder: Path) -> int:
    """Print the one line for `error` and return its exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        number = received[0] if received else signal.SIGINT
        error = Interrupted("stopped; finished stages and the last checkpoint are kept.", signal_number=number)
    if isinstance(error, Interrupted):
        return _print_error(error.code, f"{error} {_resume_advice(arguments)}".strip(), error.exit_code, limit=2000)
    if isinstance(error, BltoError):
        return _print_error(error.code, str(error), error.exit_code)
    if callable(usage := getattr(error, "format_message", None)):  # the command-line library's own usage errors
        command = getattr(getattr(error, "ctx", None), "command_path", "blto")
        words = str(usage()).replace("Value error, ", "")  # of a choice, where it comes through pydantic
        return _print_error("USAGE", f"{_sentence(words)} See `{command} --help`.", ConfigError.exit_code)
    if exhausted := out_of_memory(error):
        return _print_error(exhausted.code, str(exhausted), exhausted.exit_code)
    return _crash(error, arguments, crash_folder)


def _crash(error: BaseException, arguments: Sequence[str], folder: Path) -> int:
    """A bug of ours: the traceback goes to a file, one line says where."""
    trace = "".join(traceback.format_exception(error))
    header = f"blto {shlex.join(arguments)}\nPython {platform.python_version()} on {platform.platform()}\n\n"
    path = folder / f"crash-{secrets.token_hex(4)}.txt"
    try:
        write_text(path, header + trace)
        details = f"Details are in {show(path)}; please report them."
    except BltoError:
        details = f"Details could not be written to {show(folder)}; run again with --store in a writable place."
    what = f"{type(error).__name__}: {show(error, 100)}".rstrip(": ")
    return _print_error("BUG", f"{what}. This is a bug in blto. {details}", BUG)


def _print_error(code: str, message: str, exit_code: int, *, limit: int = _LINE_LIMIT) -> int:
    prefix = f"blto: error[{code}]: "
    sys.stderr.write(f"{prefix}{show(' '.join(message.split()), limit - len(prefix))}\n")
    sys.stderr.flush()
    return exit_code


def _resume_advice(arguments: Sequence[str]) -> str:
    """The command that goes on, for the commands that can."""
    if not arguments or arguments[0] not in {"demo", "run", "craft", "pretrain", "sweep"}:
        return ""
    if arguments[0] == "sweep":  # which always resumes
        return f"Go on with: blto {shlex.join(arguments)}"
    again = list(arguments) if "--resume" in arguments else [*arguments, "--resume"]
    return f"Go on with: blto {shlex.join(again)}"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "?", "!")) else f"{text}."


class ForgivingStream:
    """A text stream that remembers its first write error and from then on drops what it is given."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text`, with what the encoding lacks escaped."""
        if self.error is None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding or "ascii"
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self.error = error
        return len(text)

    def flush(self) -> None:
        """Flush, unless a write has failed before."""
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def forgiving_streams() -> Iterator[tuple[ForgivingStream, ForgivingStream]]:
    """Replace standard output and error by forgiving ones while the block runs."""
    before = sys.stdout, sys.stderr
    out, err = ForgivingStream(sys.stdout), ForgivingStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out, err
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            stream.flush()
            if stream.error is not None:
                _drain(stream.stream)


def _drain(stream: TextIO) -> None:
    """Point a broken stream at nothing, so that the interpreter's last flush is silent."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


@contextmanager
def termination_as_interrupt() -> Iterator[list[int]]:
    """Turn SIGTERM into KeyboardInterrupt while the block runs; yields the signals received so far.

    A training loop replaces this handler by its own, which finishes the step and saves.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):  # a second one ends the process at once, without a traceback
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are not ours
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
