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
MAX_TENSORS, MAX_DEPTH = 100_000, 64
MOST_SHARED = 8
"""Times that all tensors together may exceed the file: weights are stored twice at most, and bfloat16 is widened."""

_REBUILD, _PARAMETER = Global("torch._utils", "_rebuild_tensor_v2"), Global("torch._utils", "_rebuild_parameter")
_ORDERED = Global("collections", "OrderedDict")
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
_DROPPED = {
    "argparse.Namespace",
    "collections.defaultdict",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "torch.Size",
    "torch.device",
    "pathlib.PosixPath",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
    "builtins.set",
    "__builtin__.set",
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
        storage: from the identity that the pickle gives of a storage to it; it checks that there is such a one.
    """

    needed_by = "weights"
    max_steps = 20_000_000
    keys = (str, bytes, int)

    def __init__(self, storage: Callable[[tuple[Any, ...]], Storage]) -> None:
        super().__init__()
        self._storage = storage
        self._tensors = 0

    def named(self, reference: Global) -> Any:
        """A known name as itself; the type of a storage as its number type."""
        module, name = reference
        if reference in (_REBUILD, _PARAMETER, _ORDERED):
            return reference
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        is_number_type = module == "torch" and name in _DTYPES
        return _Dropped() if is_number_type or str(reference) in _DROPPED else super().named(reference)

    def called(self, function: Any, arguments: Any) -> Any:
        """A tensor, a mapping, or what stands for something that is not read."""
        if isinstance(function, _Dropped):
            return function
        known = function if isinstance(function, Global) else None
        if known == _ORDERED and arguments == ():
            return {}
        if known == _PARAMETER and len(arguments) == 3 and isinstance(arguments[0], Tensor):
            return arguments[0]
        if known == _REBUILD and len(arguments) in (6, 7) and isinstance(arguments[0], Storage):
            return self._tensor(*arguments[:4])
        return super().called(function, arguments)

    def filled(self, target: Any, state: Any) -> None:
        """The state of a mapping (torch keeps version numbers there) or of what is not read: dropped."""
        if type(target) is not dict and not isinstance(target, _Dropped):
            super().filled(target, state)

    def absorbs(self, target: Any) -> bool:
        """What is not read takes items, and they are dropped."""
        return isinstance(target, _Dropped)

    def external(self, identity: Any) -> Storage:
        """The storage of a persistent identity ("storage", type, key, location, numel, ...)."""
        if type(identity) is not tuple or len(identity) < 5 or identity[0] not in ("storage", b"storage"):
            return super().external(identity)  # type: ignore[no-any-return]  # it raises
        return self._storage(identity)

    def _tensor(self, storage: Storage, offset: Any, shape: Any, stride: Any) -> Tensor:
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise RefusedError(f"it has more than {MAX_TENSORS:,} tensors")
        numbers = (offset, *shape, *stride) if type(shape) is type(stride) is tuple else (None,)
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or len(shape) != len(stride):
            raise RefusedError("it has a tensor whose offset, shape or stride are no sizes")
        numel = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if len(shape) > MAX_DEPTH or (numel and last >= storage.numel) or numel > storage.numel:
            raise RefusedError("it has a tensor that reaches beyond its bytes, or is larger than they are")
        return Tensor(storage, offset if numel else 0, shape, stride)


def storage_of(identity: tuple[Any, ...]) -> Storage:
    """The storage that ("storage", type, key, location, numel, ...) names. Raises RefusedError for another form."""
    _, kind, key, _, numel = identity[:5]
    if type(kind) is not str or kind not in STORAGES.values() or type(numel) is not int or not 0 <= numel < 2**48:
        raise RefusedError("it has a storage of an unknown type or size")
    return Storage(as_text(key), kind, numel)


def grouped(value: Any, size: int) -> dict[str, dict[str, Tensor]]:
    """Every mapping in `value` that holds tensors itself, by the dotted path to it ("" for `value`): name -> tensor.

    Lists and tuples are walked as mappings of their numbers. Each object is visited once, so a value that contains
    itself ends.

    Args:
        value: what the pickle leaves.
        size: of the whole file, in bytes.

    Raises:
        RefusedError: nested too deeply, no tensor at all, or more views of the same bytes than weights ever share.
    """
    found: dict[str, dict[str, Tensor]] = {}
    waiting, seen = [("", value, 0)], set()
    while waiting:
        path, node, depth = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if depth > MAX_DEPTH:
            raise RefusedError(f"it is nested more than {MAX_DEPTH} deep")
        for key, entry in _entries(node):
            if isinstance(entry, Tensor):
                found.setdefault(path, {})[key] = entry
            elif type(entry) in (dict, list, tuple):
                waiting.append((f"{path}.{key}" if path else key, entry, depth + 1))
    if not found:
        raise RefusedError("it holds no tensor in a mapping")
    if sum(tensor.nbytes for group in found.values() for tensor in group.values()) > MOST_SHARED * size:
        raise RefusedError("its tensors share their bytes so often that they unpack to many times its size")
    return found


def _entries(node: Any) -> list[tuple[str, Any]]:
    """The items of a mapping, list or tuple, their keys as text."""
    items = node.items() if type(node) is dict else enumerate(node) if type(node) in (list, tuple) else ()
    return [(as_text(key) if isinstance(key, bytes) else str(key), entry) for key, entry in items]
