"""What a self-supervised method is to the loop: an encoder with heads, a loss over views, and an after-step hook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from blto.models.encoder import Encoder


class SSLMethod(nn.Module, ABC):
    """An encoder with the heads of one method. Knows no optimiser, device, data or poison.

    A concrete method takes the encoder as its one positional argument and its hyper-parameters as keywords.
    """

    encoder: Encoder
    views_per_pass: ClassVar[int] = 1
    """How many views of the batch go through the encoder at once."""
    i_cutmix: float = 0.0
    """The alpha of `mixing.cutmix`, for methods that have `mixed_losses`; 0 mixes nothing."""

    @abstractmethod
    def losses(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Scalars by name for a list of views, each (B, 3, H, W) floats in [0, 1]; "loss" is the one to minimise."""

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Features (B, D) -> embeddings (B, d): the space in which the method's loss compares views."""

    def mixed_losses(self, views: Sequence[Tensor], share: Tensor) -> dict[str, Tensor]:
        """The same as `losses` where `mixing.cutmix` has mixed the first view, of which `share` is each image's own."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:  # most methods have nothing to do here
        """Called after each optimiser step; `progress` is the share of training done, in (0, 1]."""

    def forward(self, views: Sequence[Tensor], share: Tensor | None = None) -> dict[str, Tensor]:
        """`losses`, or `mixed_losses` where there is a share: Fabric autocasts what goes through `forward`."""
        return self.losses(views) if share is None else self.mixed_losses(views, share)
