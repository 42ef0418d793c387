"""Encoders that others have trained: a checkpoint and an architecture's name in, an `Encoder` out, or one line why not.

A checkpoint is searched for the mapping, the prefix and the spelling of names under which most of the architecture's
tensors are found. So MoCo's `module.encoder_q.`, Lightning's `state_dict`, solo-learn's `backbone.`, the numbers of an
`nn.Sequential` of torchvision's layers, and torchvision's names for blto's own ResNet-18 need no option. (The layers of
lightly's `ResNetGenerator` in an `nn.Sequential` fit no architecture here: that net has lost its first ReLU.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from blto.errors import ConfigError, InputRefused
from blto.files.foreign.checkpoints import CODE, Checkpoint, read_checkpoint
from blto.files.reading import GIB
from blto.files.text import show
from blto.models.backbones import ResNet
from blto.models.checkpoints import load_encoder
from blto.models.encoder import CIFAR_MEAN, CIFAR_STD, Encoder, build_encoder

Array = npt.NDArray[Any]
Spelling = Callable[[str], str]
Channels = tuple[float, float, float]

PREFERRED = ("encoder_q", "online", "student", "backbone", "encoder")
"""Of several nets that fit equally well, the one whose place names one of these, the first first."""
COUNTER = "num_batches_tracked"
"""Of batch norm: not used, and not in every checkpoint."""


NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Of the layers of torchvision's ResNets, in order, those that have weights."""


@dataclass(frozen=True)
class Imported:
    """An encoder of others, and how it was found.

    Attributes:
        encoder: in eval mode, fp32.
        format, sha256, layers: of the file, see `Checkpoint`.
        place: where in the file the weights were: the mapping and the prefix of their names.
        unexpected: names of tensors there that the architecture does not have, such as heads.
        others: further places at which the same architecture was found whole.
    """

    encoder: Encoder
    format: str
    sha256: str
    layers: tuple[str, ...]
    place: str
    unexpected: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """A group of a checkpoint, a prefix of names in it, and how what follows is spelled."""

    group: str
    prefix: str
    spelling: str

    def __str__(self) -> str:
        return ".".join(part for part in (self.group, self.prefix.rstrip(".")) if part) or "the whole file"


def import_encoder(
    path: Path,
    arch: str | Mapping[str, Any],
    *,
    key_prefix: str | None = None,
    image_size: int = 32,
    mean: Channels = CIFAR_MEAN,
    std: Channels = CIFAR_STD,
    max_bytes: int = 8 * GIB,
) -> Imported:
    """Read an encoder that others have trained. Nothing in the file is run.

    Args:
        path: a state dict, alone or inside a training's checkpoint: safetensors, or what `torch.save` writes.
        arch: an entry of BACKBONES, with its options where it has any, or a model's name behind "timm/" or
            "torchvision/".
        key_prefix: take the tensors whose names start with it, in whichever mapping most of them fit.
        image_size: side of the images that it takes.
        mean, std: per channel, of images in [0, 1], as it was trained with.
        max_bytes: larger files are refused.

    Raises:
        ConfigError: an unknown architecture.
        InputRefused: CKPT-REFUSED as `read_checkpoint`; or tensors of the architecture are missing, or NaN or Inf is
            among the weights.
    """
    encoder = build_encoder(arch, seed=0, image_size=image_size)
    checkpoint = read_checkpoint(path, max_bytes=max_bytes)
    wanted = {name: tuple(value.shape) for name, value in encoder.backbone.state_dict().items()}
    spellings = _spellings(encoder)
    found = _search(checkpoint, wanted, spellings, key_prefix)
    needed = {name for name in wanted if not name.endswith(COUNTER)}
    ranked = sorted(found, key=lambda place: (-len(needed & found[place].keys()), _preference(place), str(place)))
    best = ranked[0] if ranked else _Place("", key_prefix or "", "as they are")
    names = found.get(best, {})
    if missing := sorted(needed - names.keys()):
        first, what = ", ".join(show(name, 60) for name in missing[:2]), show(str(arch), 60)
        raise InputRefused(
            f"{checkpoint.name}: {len(missing)} of {len(needed)} tensors of {what} are missing ({first}), "
            f"even at {show(str(best), 60)}, where most were found. Give another arch or key_prefix.",
            code=CODE,
        )
    arrays = checkpoint.arrays(best.group)
    state = {name: _as_float(arrays[source]) for name, source in names.items()}
    _require_finite(state, checkpoint.name)
    encoder.backbone.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    encoder.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
    encoder.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
    used = set(names.values())
    unexpected = [name for name in arrays if name.startswith(best.prefix) and name not in used]
    others = {str(place) for place in ranked[1:] if needed <= found[place].keys()} - {str(best)}
    return Imported(
        encoder.eval(),
        checkpoint.format,
        checkpoint.sha256,
        checkpoint.layers,
        str(best),
        tuple(sorted(unexpected)),
        tuple(sorted(others)),
    )


def load(path: Path, arch: str | Mapping[str, Any] | None = None, **options: Any) -> Encoder:
    """An encoder of blto's own, or, with an architecture's name, one of others; `options` as in `import_encoder`."""
    if arch is not None:
        return import_encoder(path, arch, **options).encoder
    if options:
        raise ConfigError(f"{', '.join(options)}: only for an encoder that others have trained; give arch as well.")
    return load_encoder(path)


def _search(
    checkpoint: Checkpoint,
    wanted: Mapping[str, tuple[int, ...]],
    spellings: Mapping[str, Spelling],
    key_prefix: str | None,
) -> dict[_Place, dict[str, str]]:
    """For each place the tensors that fit there by name and shape: the architecture's name -> the file's."""
    found: dict[_Place, dict[str, str]] = {}
    for group, shapes in checkpoint.groups.items():
        for name, shape in shapes.items():
            for prefix, rest in _divisions(name):
                if key_prefix is not None and prefix != key_prefix:
                    continue
                for spelling, respelled in spellings.items():
                    target = respelled(rest)
                    if wanted.get(target) == shape:
                        found.setdefault(_Place(group, prefix, spelling), {})[target] = name
    return found


def _divisions(name: str) -> Iterator[tuple[str, str]]:
    """Every way to read a dotted name as a prefix, with its dot, and a rest."""
    yield "", name
    for dot in (at for at, letter in enumerate(name) if letter == "."):
        yield name[: dot + 1], name[dot + 1 :]


def _preference(place: _Place) -> int:
    """The rank of a place among those that fit equally well."""
    return next((rank for rank, word in enumerate(PREFERRED) if word in str(place)), len(PREFERRED))


def _spellings(encoder: Encoder) -> dict[str, Spelling]:
    """How names may be spelled: as they are, as torchvision has them, or by their numbers in an `nn.Sequential`."""
    own: Spelling = _from_torchvision(encoder.backbone) if isinstance(encoder.backbone, ResNet) else str
    return {
        "as they are": str,
        "as torchvision has them": own,
        "as a sequence of torchvision's layers": lambda name: own(_from_numbers(name)),
    }


def _from_numbers(name: str) -> str:
    """`0.weight` is `conv1.weight`, `1.bias` is `bn1.bias`, `5.0.conv1.weight` is `layer2.0.conv1.weight`."""
    head, _, rest = name.partition(".")
    return f"{NUMBERED[head]}.{rest}" if head in NUMBERED else name


def _from_torchvision(backbone: ResNet) -> Spelling:
    """torchvision's name of a tensor of a basic-block ResNet to the name that blto's has for it."""
    counts = backbone.blocks

    def respelled(name: str) -> str:
        if match := re.fullmatch(r"(conv1|bn1)\.(.+)", name):
            return f"stem.{0 if match[1] == 'conv1' else 1}.{match[2]}"
        if match := re.fullmatch(r"layer(\d)\.(\d)\.(.+)", name):
            stage, block = int(match[1]) - 1, int(match[2])
            if not 0 <= stage < len(counts) or block >= counts[stage]:
                return name
            return f"stages.{sum(counts[:stage]) + block}.{match[3].replace('downsample', 'shortcut')}"
        return name

    return respelled


def _as_float(value: Array) -> Array:
    """Floats of any width as float32, whole numbers as they are; an array of its own."""
    return np.array(value, np.float32) if value.dtype.kind == "f" else np.array(value)


def _require_finite(state: Mapping[str, Array], name: str) -> None:
    """Raises InputRefused with how many tensors hold NaN or Inf, and the first."""
    bad = [key for key, value in state.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
    if bad:
        raise InputRefused(
            f"{name}: {len(bad)} of {len(state)} tensors hold NaN or Inf (first: {show(bad[0], 60)}). "
            "Ask its author for an encoder whose training did not diverge.",
            code="CKPT-NAN",
        )
