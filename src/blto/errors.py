"""Every error that a user can meet: one line, a code, and an exit status.

A `BltoError` says what was given, what is accepted and what to do, in one line. The command line prints
`blto: error[CODE]: <message>` and leaves with `exit_code`; a caller from Python catches the class. Anything that is not
a `BltoError` is a bug of ours (exit 70).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BltoError(Exception):
    """Base of all errors that blto raises on purpose.

    Args:
        message: one line; what was given, what is accepted, what to do.
        code: a more specific code than the class's own, in capitals (`IMAGE-REFUSED`).
    """

    code: str = "BUG"
    exit_code: int = 70

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        if code is not None:
            self.code = code


class ConfigError(BltoError):
    """A wrong option, key or value: found before anything is written."""

    code = "CONFIG"
    exit_code = 2


class InputRefused(BltoError):
    """A file that is damaged, hostile, or not what it claims to be."""

    code = "INPUT-REFUSED"
    exit_code = 3


class ResourceExhausted(BltoError):
    """No disk or memory left, or a place that cannot be written."""

    code = "DISK-FULL"
    exit_code = 4


class Busy(BltoError):
    """Another live process holds the directory."""

    code = "BUSY"
    exit_code = 5


class Mismatch(BltoError):
    """What is on disk is not what was recorded, or a poisoned set is used as a clean one."""

    code = "MISMATCH"
    exit_code = 6


class Diverged(BltoError):
    """Training met NaN or Inf."""

    code = "DIVERGED"
    exit_code = 7


class Interrupted(BltoError):
    """Ctrl-C (exit 130) or SIGTERM (exit 143): the state is saved and the message says how to go on.

    Attributes:
        signal_number: None where no signal came but the time that was given is over.
    """

    code = "INTERRUPTED"
    exit_code = 130

    def __init__(self, message: str, *, signal_number: int | None = None) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + (signal_number or 2)


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")


def out_of_memory(error: BaseException) -> ResourceExhausted | None:
    """The line for an error that means that memory ran out; None for any other."""
    # By name: nothing here imports torch, and its CPU allocator raises a plain RuntimeError.
    said = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _OUT_OF_MEMORY)
    if not said and not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
        return None
    advice = "not enough memory; lower the batch size (pretraining.batch_size) or free memory."
    return ResourceExhausted(advice, code="OUT-OF-MEMORY")


def nearest(name: str, known: Iterable[str]) -> str:
    """The advice behind an unknown name: the nearest known one, and all of them.

    >>> nearest("simclrr", ["simclr", "byol"])
    'did you mean "simclr"? Known: byol, simclr'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    advice = f'did you mean "{close[0]}"? ' if close else ""
    return f"{advice}Known: {', '.join(names)}"
