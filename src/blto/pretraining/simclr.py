"""SimCLR (Chen et al., ICML 2020, arXiv 2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from pydantic import Field
from torch import Tensor

from blto.models.encoder import Encoder
from blto.pretraining.method import SSLMethod
from blto.registry import Card


class SimCLR(SSLMethod):
    """NT-Xent over two views; all views go through the encoder in one batch, as in the authors' code.

    Args:
        encoder: the encoder to train.
        temperature: of the softmax in NT-Xent (paper section 2.1; 0.5 is its best for CIFAR-10, appendix B.9).
        hidden_dim: width of the projection head's hidden layer.
        output_dim: size of the embeddings.
    """

    card = Card("SimCLR", "contrasts two views of an image with all others of the batch", "arXiv 2002.05709", 2020)

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0, le=10)] = 0.5,
        hidden_dim: Annotated[int, Field(ge=1)] = 512,
        output_dim: Annotated[int, Field(ge=1)] = 128,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = SimCLRProjectionHead(encoder.feature_dim, hidden_dim, output_dim)
        self.criterion = NTXentLoss(temperature=temperature)

    def project(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, output_dim)."""
        out: Tensor = self.projector(features)
        return out

    def losses(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """NT-Xent of two views."""
        first, second = self.project(self.encoder(torch.cat(tuple(views)))).float().chunk(2)
        return {"loss": self.criterion(first, second)}
