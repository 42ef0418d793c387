"""Encoders on disk: fp16 safetensors with the spec that rebuilds the network. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blto.errors import BltoError, InputRefused
from blto.files import canonical_json, sha256_bytes, show
from blto.files.safetensors import read_safetensors, write_safetensors
from blto.models.encoder import Encoder, build_encoder


def save_encoder(path: Path, encoder: Encoder, backbone: Mapping[str, Any], image_size: int) -> None:
    """Write an encoder's weights as fp16, with its backbone's spec.

    Args:
        path: the file.
        encoder: what to save.
        backbone: the entry of BACKBONES that it was built from.
        image_size: side of the images it was built for.
    """
    arrays = {
        name: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous().numpy()
        for name, value in encoder.state_dict().items()
    }
    write_safetensors(path, arrays, {"backbone": json.dumps(dict(backbone)), "image_size": str(image_size)})


def load_encoder(path: Path) -> Encoder:
    """Rebuild an encoder that `save_encoder` wrote; in eval mode, weights widened to fp32.

    Raises:
        InputRefused: CKPT-REFUSED, with the file and what is wrong with it; CKPT-NAN where a weight is no number.
    """
    arrays, metadata = read_safetensors(path)
    try:
        backbone, size = json.loads(metadata["backbone"]), int(metadata["image_size"])
        encoder = build_encoder(backbone, seed=0, image_size=size)
        encoder.load_state_dict({name: torch.from_numpy(_widened(value)) for name, value in arrays.items()})
    except (KeyError, ValueError, TypeError, RuntimeError, BltoError) as error:
        reason = show(str(error).split("\n", 1)[0], 120)
        raise InputRefused(
            f"{show(path)}: not an encoder that blto wrote ({reason}). Give an encoder.safetensors of a run.",
            code="CKPT-REFUSED",
        ) from error
    bad = [name for name, value in encoder.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise InputRefused(
            f"{show(path)}: {len(bad)} of {len(arrays)} tensors hold NaN or Inf (first: {show(bad[0], 60)}). "
            "Pretrain it again with a lower learning rate.",
            code="CKPT-NAN",
        )
    return encoder.eval()


def weights_sha256(encoder: Encoder) -> str:
    """Hash of what an encoder computes with: its kind of backbone, and every tensor's name, type, shape and values."""
    state = {name: value.detach().cpu().contiguous().numpy() for name, value in encoder.state_dict().items()}
    told = [(name, str(value.dtype), value.shape, sha256_bytes(value.tobytes())) for name, value in state.items()]
    return sha256_bytes(canonical_json([type(encoder.backbone).__qualname__, sorted(told)]))


def _widened(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return value.astype(np.float32) if value.dtype == np.float16 else value
