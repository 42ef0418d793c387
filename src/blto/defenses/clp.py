"""CLP: prune the channels that can react most strongly to their input (Zheng et al., ECCV 2022)."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from blto.defenses.base import Conditions, EncoderRepair, Images
from blto.defenses.evidence import Evidence
from blto.errors import Diverged, InputRefused
from blto.evaluation.features import is_finite
from blto.files import show
from blto.models.encoder import Encoder
from blto.registry import Card

SIDE = 224
"""Of the image without content that shows how a backbone's layers are connected."""
CANNOT = "so CLP cannot tell which channels to prune; use another defense, or a backbone like resnet18"


class _Connections:
    """Who made what each batch norm is given, as hooks see it."""

    def __init__(self, backbone: nn.Module) -> None:
        self.makers: dict[str, set[str | None]] = {}
        self._made: dict[int, tuple[Tensor, int, str]] = {}
        for name, part in backbone.named_modules():
            if isinstance(part, nn.Conv2d):
                part.register_forward_hook(lambda part, given, made, name=name: self._note(made, name))
            elif isinstance(part, nn.BatchNorm2d):
                self.makers[name] = set()
                part.register_forward_pre_hook(lambda part, given, name=name: self._ask(given[0], name))

    def _note(self, made: Tensor, name: str) -> None:
        self._made[id(made)] = (made, made._version, name)  # held, so that no other tensor gets its id

    def _ask(self, given: Tensor, norm: str) -> None:
        _, version, maker = self._made.get(id(given), (given, -1, None))
        # An addition in place makes it another value in the same tensor, and a higher version.
        self.makers[norm].add(maker if given._version == version else None)


def pair(backbone: nn.Module) -> dict[str, str]:
    """Name of every 2-D batch norm -> name of the convolution whose very output it is given.

    Found by following an image without content through a copy without weights: what layers are called, and the order
    in which they are declared, does not matter.

    Raises:
        InputRefused: no batch norm, or one that a single convolution cannot be told for, or that has no scale or no
            running variance.
    """
    probe = deepcopy(backbone).to("meta").eval()
    connections = _Connections(probe)
    if not connections.makers:
        raise InputRefused(f"the backbone has no 2-D batch norm, {CANNOT}.")
    try:
        with torch.no_grad():
            probe(torch.zeros(1, 3, SIDE, SIDE, device="meta"))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = show(str(error).split("\n", 1)[0], 120)
        raise InputRefused(f"the backbone does not take images of {SIDE} pixels ({reason}), {CANNOT}.") from error
    pairs = {norm: next(iter(makers)) for norm, makers in connections.makers.items() if len(makers) == 1}
    for norm in connections.makers:
        layer = cast(nn.BatchNorm2d, probe.get_submodule(norm))
        if pairs.get(norm) is None:
            raise InputRefused(f"batch norm {norm} of the backbone does not follow one convolution, {CANNOT}.")
        if not layer.affine or layer.running_var is None:
            raise InputRefused(f"batch norm {norm} of the backbone has no scale or no running variance, {CANNOT}.")
    return cast(dict[str, str], pairs)


def channel_bounds(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Each channel's UCLC, float64 (C,): sigma_max(W_c as C_in x k^2) |gamma_c| / sqrt(var_c + eps).

    The channel is Lipschitz with k times this bound, a factor that all channels of a layer share.
    """
    spectral: Tensor = torch.linalg.matrix_norm(convolution.weight.double().flatten(2), ord=2)
    return spectral * norm.weight.double().abs() / (cast(Tensor, norm.running_var).double() + norm.eps).sqrt()


def outliers(bounds: Tensor, u: float) -> Tensor:
    """Bool (C,): which lie above mean + u standard deviations (of the sample: C - 1 below the sum)."""
    spread = bounds.std() if len(bounds) > 1 else 0.0
    return bounds > bounds.mean() + u * spread


@torch.no_grad()
def prune(backbone: nn.Module, u: float) -> dict[str, list[int]]:
    """Set scale and shift of every outlying channel to 0, in place. Returns batch norm -> the channels pruned.

    Raises:
        InputRefused: pairs cannot be told (`pair`); then nothing is changed.
        Diverged: a weight is NaN or infinite.
    """
    pairs = pair(backbone)
    if not all(is_finite(value) for value in backbone.state_dict().values()):
        raise Diverged("the encoder holds NaN or Inf; there is nothing to repair in it, pretrain it anew.")
    pruned = {}
    for name, convolution in pairs.items():
        norm = cast(nn.BatchNorm2d, backbone.get_submodule(name))
        chosen = outliers(channel_bounds(cast(nn.Conv2d, backbone.get_submodule(convolution)), norm), u)
        norm.weight[chosen] = 0
        norm.bias[chosen] = 0
        pruned[name] = chosen.nonzero().flatten().tolist()
    return pruned


class CLP(EncoderRepair):
    """Prune the channels whose Lipschitz bound stands out of their layer; needs no image.

    Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, arXiv 2208.03111. A trigger
    that is small in the image and large in the features must pass channels that react strongly. The bound of channel c
    of a convolution with its batch norm (UCLC) is sigma_max(W_c) |gamma_c| / sqrt(var_c + eps), W_c reshaped to
    C_in x k^2; channels above mean + u sd of their layer get scale and shift 0. Of C channels none is further than
    (C - 1) / sqrt(C) sd above the mean, so a layer of 10 channels or fewer is never pruned at u = 3.

    Where this differs from the authors' code: they take the convolution declared last before a batch norm for its own,
    silently wrong where declaration is not the order of computation, and for pre-activation nets; here pairs are read
    off the connections, and a backbone in which they cannot be told is refused. They leave eps out, which makes a
    channel that never varied infinitely strong, and the mean of its layer with it.

    Args:
        u: how many standard deviations (the authors: 3, and 0 to 10 in their sweep); large leaves the encoder as it is.
    """

    card = Card(
        "CLP",
        "prune the channels that can react most strongly to their input",
        "arXiv 2208.03111",
        2022,
        "the encoder alone",
    )
    evidence = Evidence(
        "On four of four patch victims the ASR falls to 8-14% (on one, by a probe of other images, to 29%), for a "
        "point of accuracy; BadEncoder's falls by 11 points at most, BLTO's not.",
        must_show="test_clp::test_a_large_u_is_the_identity_and_a_small_one_is_not",
        positive="test_clp::test_the_planted_channel_is_pruned_and_no_other_and_the_trigger_is_dead",
    )

    def __init__(self, *, u: Annotated[float, Field(ge=0)] = 3.0) -> None:
        self.u = u

    def repair(self, encoder: Encoder, images: Images, conditions: Conditions) -> Encoder:
        """See `EncoderRepair.repair`. Says how many channels it pruned; draws nothing.

        Raises:
            InputRefused: a backbone in which no batch norm, or not every one, follows a convolution.
            Diverged: a weight is NaN or infinite.
        """
        pruned = prune(encoder.backbone, self.u)
        channels = sum(cast(nn.BatchNorm2d, encoder.backbone.get_submodule(name)).num_features for name in pruned)
        conditions.progress.say(f"CLP: {sum(len(each) for each in pruned.values())} of {channels} channels pruned")
        return encoder
