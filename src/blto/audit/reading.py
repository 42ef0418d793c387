"""Reading the encoders of a scan: the suspect, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blto.data.images import ImageSet
from blto.errors import ConfigError, Diverged, InputRefused
from blto.evaluation import extract
from blto.files import canonical_json, sha256_bytes, sha256_file, show
from blto.files.safetensors import read_safetensors
from blto.models.backbones import ResNet
from blto.models.checkpoints import load_encoder, weights_sha256
from blto.models.encoder import Encoder
from blto.models.foreign import import_encoder
from blto.models.spellings import AS_THEY_ARE


@dataclass(frozen=True)
class Suspect:
    """An encoder that was read.

    Attributes:
        encoder: in evaluation mode.
        name: of its file.
        sha256: of its bytes.
        format: "blto", or as in `models.foreign.Imported`.
        identity: hash of what the encoder computes with, whatever file and place it came from.
        notes: where in the file it was found and what was left over, as sentences.
    """

    encoder: Encoder
    name: str
    sha256: str
    format: str
    identity: str
    notes: tuple[str, ...] = ()


def suspect_of(encoder: Encoder, name: str, sha256: str, kind: str, notes: Sequence[str] = ()) -> Suspect:
    """The suspect that an encoder in evaluation mode is."""
    identity = weights_sha256(encoder)
    if not isinstance(encoder.backbone, ResNet):  # a library's: eps, padding and activations are in no tensor
        identity = sha256_bytes(canonical_json([identity, repr(encoder.backbone)]))
    return Suspect(encoder, name, sha256, kind, identity, tuple(notes))


def read_suspect(path: Path, arch: str | None, options: Mapping[str, Any]) -> Suspect:
    """Read an encoder of blto's own, or with `arch` one of others; `options` as in `import_encoder`.

    Raises:
        InputRefused: the file is refused.
        ConfigError: options for a foreign file without an architecture.
    """
    if arch is None:
        if options:
            raise ConfigError(f"{', '.join(options)}: only for an encoder that others have trained; give --arch too.")
        return suspect_of(load_encoder(path), show(path.name), sha256_file(path), "blto")
    found = import_encoder(path, arch, **options)
    named = "" if found.spelling == AS_THEY_ARE else f", its tensors named {found.spelling}"
    notes = [f"Read as {show(arch, 60)} from {found.place}{named}.", *([found.differs] if found.differs else [])]
    if found.unexpected:
        notes.append(
            f"{len(found.unexpected)} further tensors there are no part of it and were left out (first: "
            f"{show(found.unexpected[0])})."
        )
    if found.layers:
        notes.append(f"A legacy pickle, read in a process of its own; what held it there: {', '.join(found.layers)}.")
    return suspect_of(found.encoder.eval(), show(path.name), found.sha256, found.format, notes)


def require_features(suspect: Suspect, images: ImageSet) -> None:
    """Raises InputRefused, CKPT-NAN, where the features of images are no numbers, though the weights are."""
    try:
        extract(suspect.encoder, images.images[:64])
    except Diverged as error:
        raise InputRefused(
            f"{suspect.name}: its features of {images.name} hold NaN or Inf, though its weights do not. "
            "Ask its author for an encoder whose training did not diverge.",
            code="CKPT-NAN",
        ) from error


def read_clean(paths: Sequence[Path], suspect: Suspect, arch: str | None, options: Mapping[str, Any]) -> list[Suspect]:
    """The clean encoders, each once and without the suspect itself.

    Raises:
        ConfigError: one is of another family.
        InputRefused: one is refused.
    """
    read = (read_of_family(path, suspect, arch, options) for path in paths)
    return list({each.identity: each for each in read if each.identity != suspect.identity}.values())


def read_of_family(path: Path, suspect: Suspect, arch: str | None, options: Mapping[str, Any]) -> Suspect:
    """A clean encoder. Raises ConfigError where its tensors have other names or shapes than the suspect's."""
    own = arch is None or (path.suffix == ".safetensors" and _is_ours(path))
    read = read_suspect(path, None if own else arch, {} if own else options)
    shapes = [
        {name: tuple(value.shape) for name, value in each.encoder.state_dict().items()} for each in (read, suspect)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"--clean {read.name}: is of another family than {suspect.name}, its tensors have other names or shapes; "
            "give encoders of the same architecture."
        )
    return read


def _is_ours(path: Path) -> bool:
    """Whether blto wrote the file."""
    try:
        return "backbone" in read_safetensors(path)[1]
    except InputRefused:
        return False
