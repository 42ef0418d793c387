"""Pickles of other programs, read without running them.

A pickle is a program. Here its instructions are listed (`pickletools.genops`, which runs none) and an allow-list of
them is interpreted into plain data: numbers, texts, lists, tuples, mappings. What a pickle refers to by name is never
imported and what it calls is never called: a subclass says which names it knows and which plain value stands for each.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from blto.files.text import show


class RefusedError(Exception):
    """Why a foreign file is refused; the reader of its format adds the file and the advice."""


class CodeFoundError(RefusedError):
    """It is refused because it would run something: what nothing but data never does."""


class Global(NamedTuple):
    """What a pickle refers to by name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


MARK = object()


class Interpreter:
    """A stack, a memo, and one method per kind of instruction. One object interprets one pickle.

    Attributes:
        needed_by: what such pickles hold, for messages.
        max_steps: instructions beyond which a pickle is refused.
    """

    needed_by: ClassVar[str] = "plain data"
    max_steps: ClassVar[int] = 2_000_000

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes | io.BytesIO) -> Any:
        """The one value that the pickle leaves; a stream is read up to the pickle's end.

        Raises:
            RefusedError: an instruction, a name or a call that is not allowed; nothing was run.
            Exception: of any kind, for a damaged program: an empty stack, a missing memo, a bad length.
        """
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step > self.max_steps:
                raise RefusedError(f"it is longer than {self.needed_by} ever are")
            if opcode.name == "STOP":
                break
            if opcode.name in _LITERALS:
                self.stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise CodeFoundError(f"it uses {opcode.name}, which {self.needed_by} never need; nothing was run")
        if len(self.stack) != 1:
            raise RefusedError("it does not end with one value")
        return self.stack[0]

    def named(self, reference: Global) -> Any:
        """The value that stands for a name. Raises RefusedError for one that is not known."""
        name = show(str(reference), 80)
        raise CodeFoundError(f"it refers to {name}, which {self.needed_by} never need; nothing was run")

    def called(self, function: Any, arguments: Any) -> Any:
        """The value that stands for a call. Raises RefusedError for one that is not known."""
        raise CodeFoundError(f"it calls something that {self.needed_by} never need; nothing was run")

    def filled(self, target: Any, state: Any) -> None:
        """Take note of the state of what stands for an object. Raises RefusedError where it may have none."""
        raise CodeFoundError(f"it sets the state of something that {self.needed_by} never have; nothing was run")

    def external(self, identity: Any) -> Any:
        """The value that stands for what lies outside of the pickle. Raises RefusedError where nothing may."""
        raise RefusedError("it refers to something outside of itself; nothing was run")

    def as_set(self, items: list[Any]) -> Any:
        """The value that stands for a set. Raises RefusedError where there may be none."""
        raise RefusedError(f"it has a set, which {self.needed_by} never do; nothing was run")

    def keyed(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        """Set one item of a mapping. Raises RefusedError for a key that is not allowed."""
        if type(key) not in (str, bytes):
            raise RefusedError("it has a key that is not a text")
        target[key] = value

    def absorbs(self, target: Any) -> bool:
        """Whether what stands for an object takes items, which are then dropped."""
        return False

    def since_mark(self) -> list[Any]:
        """Pop everything above the topmost mark, and the mark."""
        start = next(index for index in reversed(range(len(self.stack))) if self.stack[index] is MARK)
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def last(self, count: int) -> list[Any]:
        """Pop `count` values."""
        if len(self.stack) < count:
            raise RefusedError("it takes more than it has")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def append(self, items: list[Any]) -> None:
        """Append to the list on top."""
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        elif not self.absorbs(self.stack[-1]):
            raise RefusedError("it appends to what is not a list")

    def set_items(self, items: list[Any]) -> None:
        """Set items of the mapping on top."""
        target = self.stack[-1]
        if len(items) % 2 or not (type(target) is dict or self.absorbs(target)):
            raise RefusedError("it sets items of what is not a mapping")
        if type(target) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                self.keyed(target, key, value)

    def add(self, items: list[Any]) -> None:
        """Add to the set on top."""
        if not self.absorbs(self.stack[-1]):
            raise RefusedError("it adds to what is not a set")

    def put(self, key: int | None) -> None:
        """Remember the value on top."""
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def name_global(self, module: Any, name: Any) -> None:
        """Push what stands for a name."""
        self.stack.append(self.named(Global(as_text(module), as_text(name))))

    def reduce(self, *, keywords: bool = False) -> None:
        """Push what stands for a call; its keywords are dropped."""
        if keywords:
            self.last(1)
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.called(function, arguments))

    def build(self) -> None:
        """Give a state to the value on top."""
        state = self.stack.pop()
        self.filled(self.stack[-1], state)


_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINBYTES"}
_LITERALS |= {"BYTEARRAY8", "BINBYTES8", "SHORT_BINBYTES", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_ACTIONS: dict[str, Callable[[Interpreter, Any], None]] = {
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.last(3))),
    "APPEND": lambda machine, _: machine.append(machine.last(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "BINPUT": Interpreter.put,
    "LONG_BINPUT": Interpreter.put,
    "MEMOIZE": Interpreter.put,
    "BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "LONG_BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "GLOBAL": lambda machine, argument: machine.name_global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name_global(*machine.last(2)),
    "REDUCE": lambda machine, _: machine.reduce(),
    "NEWOBJ": lambda machine, _: machine.reduce(),
    "NEWOBJ_EX": lambda machine, _: machine.reduce(keywords=True),
    "EMPTY_SET": lambda machine, _: machine.stack.append(machine.as_set([])),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.as_set(machine.since_mark())),
    "ADDITEMS": lambda machine, _: machine.add(machine.since_mark()),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.stack.append(machine.external(machine.stack.pop())),
}


def as_text(value: Any) -> str:
    """A text, also one spelled as bytes. Raises RefusedError for anything else."""
    if not isinstance(value, str | bytes):
        raise RefusedError("it has something else where a text belongs")
    return value.decode("latin-1") if isinstance(value, bytes) else value
