"""Encoders that others have trained: a checkpoint and an architecture's name in, an `Encoder` out, or one line why not.

A checkpoint is searched for the mapping, the prefix and the spelling of names under which most of the architecture's
tensors are found. So MoCo's `module.encoder_q.`, Lightning's `state_dict`, solo-learn's `backbone.`, the numbers of an
`nn.Sequential` of torchvision's layers, and torchvision's names for blto's own ResNet-18 need no option. (The layers of
lightly's `ResNetGenerator` in an `nn.Sequential` fit no architecture here: that net has lost its first ReLU.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from blto.models.checkpoints import load_encoder
from blto.models.encoder import CIFAR_MEAN, CIFAR_STD, Encoder, build_encoder
from blto.models.places import Place, preference, search, spellings_of

Array = npt.NDArray[Any]
Channels = tuple[float, float, float]

COUNTER = "num_batches_tracked"
"""Of batch norm: not used, and not in every checkpoint."""


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
        key_prefix: which of several nets: the beginning of its tensors' names, or the whole path to it in the file, as
            `Imported.place` has it.
        image_size: side of the images that it takes.
        mean, std: per channel, of images in [0, 1], as it was trained with.
        max_bytes: larger files are refused.

    Raises:
        ConfigError: an unknown architecture, one that does not take such images, or channels that are no numbers.
        InputRefused: CKPT-REFUSED as `read_checkpoint`, or where tensors of the architecture are missing, of another
            shape or kind, or several nets fit equally well; CKPT-NAN where weights or features hold NaN or Inf.
    """
    encoder = _built(arch, image_size, mean, std)
    checkpoint = read_checkpoint(path, max_bytes=max_bytes)
    own = encoder.backbone.state_dict()
    wanted = {name: tuple(value.shape) for name, value in own.items()}
    found = search(checkpoint.groups, wanted, spellings_of(encoder), key_prefix)
    needed = {name for name in wanted if not name.endswith(COUNTER)}
    ranked = sorted(found, key=lambda place: (-len(needed & found[place].keys()), preference(place), str(place)))
    complete = [place for place in ranked if needed <= found[place].keys()]
    if not complete:
        raise _missing(checkpoint, ranked[0] if ranked else None, found, wanted, needed, show(str(arch), 60))
    best = complete[0]
    if len(complete) > 1 and preference(best) == preference(complete[1]):
        several = ", ".join(show(str(place), 60) for place in complete[:3])
        raise InputRefused(
            f"{checkpoint.name}: {len(complete)} places in it fit ({several}); give one of them as key_prefix.",
            code=CODE,
        )
    arrays = checkpoint.arrays(best.group)
    names = found[best]
    state = {name: _of_kind(arrays[source], own[name], source, checkpoint.name) for name, source in names.items()}
    _require_finite(state, checkpoint.name)
    encoder.backbone.load_state_dict(own | {name: torch.from_numpy(value) for name, value in state.items()})
    _require_features(encoder.eval(), image_size, checkpoint.name)
    used = set(names.values())
    unexpected = [name for name in arrays if name.startswith(best.prefix) and name not in used]
    return Imported(
        encoder,
        checkpoint.format,
        checkpoint.sha256,
        checkpoint.layers,
        str(best),
        tuple(sorted(unexpected)),
        tuple(str(place) for place in complete[1:]),
    )


def _built(arch: str | Mapping[str, Any], image_size: int, mean: Channels, std: Channels) -> Encoder:
    """The architecture, untrained. Raises ConfigError for one that cannot be, or does not take such images."""
    for name, values in (("mean", mean), ("std", std)):
        if (
            len(values) != 3
            or not all(math.isfinite(value) for value in values)
            or (name == "std" and min(values) <= 0)
        ):
            raise ConfigError(f"{name} is {show(str(values), 60)}; give three numbers, one a channel, of std above 0.")
    try:
        encoder = build_encoder(arch, seed=0, image_size=image_size)
    except (AssertionError, RuntimeError, ValueError) as error:  # as each library says it
        what, reason = show(str(arch), 60), show(str(error), 100)
        raise ConfigError(f"{what} does not take images of {image_size} pixels ({reason}); give image_size.") from error
    encoder.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
    encoder.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
    return encoder


def _missing(
    checkpoint: Checkpoint,
    best: Place | None,
    found: Mapping[Place, Mapping[str, str]],
    wanted: Mapping[str, tuple[int, ...]],
    needed: set[str],
    what: str,
) -> InputRefused:
    """Why no place is complete: the tensors that the best one lacks, or has in another shape."""
    if best is None or not needed & found[best].keys():
        text = f"none of the {len(needed)} tensors of {what} is in it, by name and shape"
        return InputRefused(f"{checkpoint.name}: {text}. Give another arch or key_prefix.", code=CODE)
    lacking = sorted(needed - found[best].keys())
    shapes = checkpoint.groups[best.group]
    shaped = [name for name in lacking if best.prefix + name in shapes]
    first = lacking[0]
    detail = show(first, 60)
    if shaped:
        first = shaped[0]
        detail = f"{show(first, 60)} has shape {shapes[best.prefix + first]}, not {wanted[first]}"
    text = f"{len(lacking)} of {len(needed)} tensors of {what} are missing at {show(str(best), 60)} ({detail})"
    return InputRefused(f"{checkpoint.name}: {text}. Give another arch or key_prefix.", code=CODE)


def load(path: Path, arch: str | Mapping[str, Any] | None = None, **options: Any) -> Encoder:
    """An encoder of blto's own, or, with an architecture's name, one of others; `options` as in `import_encoder`."""
    if arch is not None:
        return import_encoder(path, arch, **options).encoder
    if options:
        raise ConfigError(f"{', '.join(options)}: only for an encoder that others have trained; give arch as well.")
    return load_encoder(path)


def _of_kind(value: Array, own: torch.Tensor, name: str, file: str) -> Array:
    """The array as the architecture has it, floats as float32. Raises InputRefused for another kind of numbers."""
    if (value.dtype.kind == "f") != own.is_floating_point():
        raise InputRefused(
            f"{file}: {show(name, 60)} holds {value.dtype}, where the architecture has {show(str(own.dtype))}. "
            "Ask its author for the weights as they were trained.",
            code=CODE,
        )
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        return np.array(value, np.float32 if own.is_floating_point() else np.int64)


def _require_finite(state: Mapping[str, Array], name: str) -> None:
    """Raises InputRefused with how many tensors hold NaN or Inf, and the first."""
    bad = [key for key, value in state.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
    if bad:
        raise InputRefused(
            f"{name}: {len(bad)} of {len(state)} tensors hold NaN or Inf (first: {show(bad[0], 60)}). "
            "Ask its author for an encoder whose training did not diverge.",
            code="CKPT-NAN",
        )


def _require_features(encoder: Encoder, image_size: int, name: str) -> None:
    """Raises InputRefused where weights that are numbers give features that are none."""
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        finite = bool(torch.isfinite(encoder(images)).all())
    if not finite:
        raise InputRefused(
            f"{name}: its features of two images of noise hold NaN or Inf, though its weights do not. "
            "Ask its author for an encoder whose training did not diverge.",
            code="CKPT-NAN",
        )
