"""The pickle inside a torch checkpoint: which tensors it holds and where their bytes lie. Nothing in it is run.

Written from the format of `torch.save` (torch/serialization.py and torch/_utils.py of torch 2.14): a tensor is a call
of `_rebuild_tensor_v2(storage, offset, shape, stride, ...)`, a storage a reference to outside of the pickle. Only dense
strided tensors of plain numbers are taken; sparse, quantised, nested and subclassed ones are refused by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blto.files.foreign.pickles import Global, Interpreter, RefusedError, as_text
from blto.files.safetensors import NAMES

Array = npt.NDArray[Any]

STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
MAX_DIMENSIONS, MAX_NAME = 16, 512

_REBUILD, _PARAMETER = Global("torch._utils", "_rebuild_tensor_v2"), Global("torch._utils", "_rebuild_parameter")
_REBUILD_FIRST = Global("torch._utils", "_rebuild_tensor")
_ORDERED = Global("collections", "OrderedDict")
_DTYPES = {
    "complex64",
    "complex128",
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
}
_DROPPED = {
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    "_codecs.encode",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
    "torch.Size",
    "torch.device",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "types.SimpleNamespace",
    "typing.Any",
    "yacs.config.CfgNode",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    *(
        f"builtins.{name}"
        for name in ("bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "long")
    ),
    *(f"builtins.{name}" for name in ("set", "str", "tuple")),
}
"""What training scripts keep beside weights: known by name, never built, and not part of what is read."""


class Storage(NamedTuple):
    """Numbers outside of the pickle.

    Attributes:
        key: its name there.
        kind: NumPy's spelling of its type, or "bf16".
        numel: how many numbers it is said to have.
    """

    key: str
    kind: str
    numel: int

    @property
    def spelled(self) -> str:
        """How safetensors spells the type of a copy."""
        return NAMES[np.dtype("<f4" if self.kind == "bf16" else self.kind)]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.numel * (2 if self.kind == "bf16" else np.dtype(self.kind).itemsize)


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, inside its bounds. `offset` and `stride` count numbers, as torch's do."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a copy."""
        return math.prod(self.shape) * (4 if self.storage.kind == "bf16" else np.dtype(self.storage.kind).itemsize)

    def taken_from(self, data: bytes | memoryview) -> Array:
        """A copy of its numbers, from the bytes of its storage; bfloat16 is widened to float32."""
        kind = self.storage.kind
        whole = np.frombuffer(data, "<u2" if kind == "bf16" else kind, count=self.storage.numel)
        size = whole.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            whole[self.offset :], self.shape, [step * size for step in self.stride], writeable=False
        )
        if kind == "bf16":
            return (view.astype("<u4") << 16).view("<f4")
        return np.array(view)


class _Dropped:
    """Stands for something that is not read."""


class Weights(Interpreter):
    """Interprets the pickle of a checkpoint.

    Args:
        check: is shown every storage that the pickle refers to; raises RefusedError where there is no such one.

    Attributes:
        storages: those that it refers to, by their keys.
    """

    needed_by = "weights"

    def __init__(self, check: Callable[[Storage], None] = lambda storage: None) -> None:
        super().__init__()
        self._check = check
        self.storages: dict[str, Storage] = {}

    def named(self, reference: Global) -> Any:
        """A known name as itself; the type of a storage as its number type."""
        module, name = reference
        if reference in (_REBUILD, _REBUILD_FIRST, _PARAMETER, _ORDERED):
            return reference
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = Global("builtins", name) if module == "__builtin__" else reference  # of Python 2, and of protocol 2
        if str(known) in _DROPPED or (module == "torch" and name in _DTYPES):
            return _Dropped()
        return super().named(reference)

    def called(self, function: Any, arguments: Any) -> Any:
        """A tensor, a mapping, or what stands for something that is not read."""
        if isinstance(function, _Dropped):
            return function
        known = function if isinstance(function, Global) and type(arguments) is tuple else None
        count = len(arguments) if known else 0
        if known == _ORDERED and count <= 1:
            return self._ordered(*arguments)
        if known == _PARAMETER and count == 3 and isinstance(arguments[0], Tensor):
            return arguments[0]
        is_tensor = (known == _REBUILD and count in (6, 7)) or (known == _REBUILD_FIRST and count == 4)
        if is_tensor and isinstance(arguments[0], Storage):
            extra = arguments[6] if count == 7 else None
            if extra is not None and not (type(extra) is dict and not extra):
                raise RefusedError("it has a negated or conjugated tensor; save it again with .resolve_neg()")
            return self._tensor(*arguments[:4])
        return super().called(function, arguments)

    def filled(self, target: Any, state: Any) -> None:
        """The state of a mapping (torch keeps version numbers there) or of what is not read: dropped."""
        if type(target) is not dict and not isinstance(target, _Dropped):
            super().filled(target, state)

    def absorbs(self, target: Any) -> bool:
        """What is not read takes items, and they are dropped."""
        return isinstance(target, _Dropped)

    def as_set(self, items: list[Any]) -> Any:
        """Sets are not read."""
        return _Dropped()

    def keyed(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        """Keys become texts, those of optimisers too, which are numbers; items with any other key are dropped."""
        if type(key) not in (str, bytes, int):
            return
        text = str(key) if type(key) is int and abs(key) < 2**60 else as_text(key)
        if text in target or len(text) > MAX_NAME:
            raise RefusedError("it has two entries of one name, or a name that is too long")
        target[text] = value

    def external(self, identity: Any) -> Storage:
        """The storage of a persistent identity ("storage", type, key, location, numel, ...)."""
        if type(identity) is not tuple or len(identity) < 5 or identity[0] not in ("storage", b"storage"):
            super().external(identity)
        if len(identity) > 5 and identity[5] is not None:
            raise RefusedError("it has a storage that is a view of another; save it again with a newer torch")
        _, kind, key, _, numel = identity[:5]
        if type(kind) is not str or kind not in STORAGES.values() or type(numel) is not int or not 0 <= numel < 2**48:
            raise RefusedError("it has a storage of an unknown type or size")
        storage = Storage(as_text(key), kind, numel)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise RefusedError("it has one storage in two forms")
        self._check(storage)
        return storage

    def _ordered(self, pairs: Any = ()) -> dict[str, Any]:
        """An ordered mapping; Python 2 gave it its items at once."""
        made: dict[str, Any] = {}
        if type(pairs) not in (list, tuple) or not all(
            type(each) in (list, tuple) and len(each) == 2 for each in pairs
        ):
            raise RefusedError("it makes a mapping of what are no pairs")
        for key, value in pairs:
            self.keyed(made, key, value)
        return made

    def _tensor(self, storage: Storage, offset: Any, shape: Any, stride: Any) -> Tensor:
        if not type(shape) is type(stride) is tuple or not len(shape) == len(stride) <= MAX_DIMENSIONS:
            raise RefusedError("it has a tensor whose shape or stride are none")
        if not all(type(number) is int and 0 <= number < 2**48 for number in (offset, *shape, *stride)):
            raise RefusedError("it has a tensor whose offset, shape or stride are no sizes")
        if math.prod(max(1, size) for size in shape) >= 2**48:  # an empty one too: no array has such a shape
            raise RefusedError("it has a tensor whose shape is larger than any")
        numel = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if (numel and last >= storage.numel) or numel > storage.numel:
            raise RefusedError("it has a tensor that reaches beyond its bytes, or is larger than they are")
        return Tensor(storage, offset if numel else 0, shape, stride)
