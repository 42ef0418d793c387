"""Encoders that others have trained: a checkpoint and an architecture's name in, an `Encoder` out, or one line why not.

A checkpoint is searched for the mapping, the prefix and the spelling of names under which most of the architecture's
tensors are found. So MoCo's `module.encoder_q.`, Lightning's `state_dict`, solo-learn's `backbone.`, the numbers of an
`nn.Sequential` of torchvision's layers, torchvision's names for blto's own ResNet-18, and EfficientNet-PyTorch's for
timm's nets need no option. (The layers of lightly's `ResNetGenerator` in an `nn.Sequential` fit no architecture here:
that net has lost its first ReLU.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blto.errors import ConfigError, InputRefused
from blto.files.foreign.checkpoints import CODE, Checkpoint, read_checkpoint
from blto.files.reading import GIB
from blto.files.text import show
from blto.models.checkpoints import load_encoder
from blto.models.encoder import CIFAR_MEAN, CIFAR_STD, Encoder, build_encoder
from blto.models.places import Place, preference, search
from blto.models.soundness import of_kind, require_features, require_finite
from blto.models.spellings import Spelling, difference, spellings_of

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
        spelling: how its names were read, see `spellings_of`.
        differs: a sentence, where its names tell that the architecture computes something else with these weights.
    """

    encoder: Encoder
    format: str
    sha256: str
    layers: tuple[str, ...]
    place: str
    unexpected: tuple[str, ...]
    others: tuple[str, ...]
    spelling: str
    differs: str


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
    spellings = spellings_of(encoder)
    found = search(checkpoint.groups, wanted, spellings, key_prefix)
    needed = {name for name in wanted if not name.endswith(COUNTER)}
    ranked = sorted(found, key=lambda place: (-len(needed & found[place].keys()), preference(place), str(place)))
    complete = [place for place in ranked if needed <= found[place].keys()]
    if not complete:
        raise _missing(checkpoint, ranked[:1], found, wanted, needed, spellings, show(str(arch), 60))
    best = complete[0]
    if len(complete) > 1 and preference(best) == preference(complete[1]):
        several = ", ".join(show(str(place), 60) for place in complete[:3])
        raise InputRefused(
            f"{checkpoint.name}: {len(complete)} places in it fit ({several}); give one of them as key_prefix.",
            code=CODE,
        )
    arrays = checkpoint.arrays(best.group)
    names = found[best]
    state = {name: of_kind(arrays[source], own[name], source, checkpoint.name) for name, source in names.items()}
    require_finite(state, checkpoint.name)
    encoder.backbone.load_state_dict(own | {name: torch.from_numpy(value) for name, value in state.items()})
    require_features(encoder.eval(), image_size, checkpoint.name)
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
        best.spelling,
        difference(best.spelling, encoder, show(str(arch), 60)),
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
    ranked: Sequence[Place],
    found: Mapping[Place, Mapping[str, str]],
    wanted: Mapping[str, tuple[int, ...]],
    needed: set[str],
    spellings: Mapping[str, Spelling],
    what: str,
) -> InputRefused:
    """Why no place is complete: the tensors that the best one lacks, or has in another shape."""
    if not ranked or not needed & found[ranked[0]].keys():
        text = f"none of the {len(needed)} tensors of {what} is in it, by name and shape"
        return InputRefused(f"{checkpoint.name}: {text}. Give another arch or key_prefix.", code=CODE)
    best = ranked[0]
    lacking = sorted(needed - found[best].keys())
    start, respelled = len(best.prefix), spellings[best.spelling]
    group = checkpoint.groups[best.group]
    shapes = {respelled(name[start:]): shape for name, shape in group.items() if name.startswith(best.prefix)}
    shaped = [name for name in lacking if name in shapes]
    first = lacking[0]
    detail = show(first, 60)
    if shaped:
        first = shaped[0]
        detail = f"{show(first, 60)} has shape {shapes[first]}, not {wanted[first]}"
    text = f"{len(lacking)} of {len(needed)} tensors of {what} are missing at {show(str(best), 60)} ({detail})"
    return InputRefused(f"{checkpoint.name}: {text}. Give another arch or key_prefix.", code=CODE)


def load(path: Path, arch: str | Mapping[str, Any] | None = None, **options: Any) -> Encoder:
    """An encoder of blto's own, or, with an architecture's name, one of others; `options` as in `import_encoder`.

    Warns where the architecture is known to compute something else with the file's weights.
    """
    if arch is not None:
        found = import_encoder(path, arch, **options)
        if found.differs:
            warnings.warn(f"{show(path)}: {found.differs}", stacklevel=3)
        return found.encoder
    if options:
        raise ConfigError(f"{', '.join(options)}: only for an encoder that others have trained; give arch as well.")
    return load_encoder(path)
