"""BYOL (Grill et al., NeurIPS 2020, arXiv 2006.07733)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from pydantic import Field
from torch import Tensor

from blto.models.encoder import Encoder
from blto.pretraining.method import SSLMethod
from blto.registry import Card


class BYOL(SSLMethod):
    """An online network predicts the embeddings of its own moving average (section 3.1).

    The loss is lightly's negative cosine: the paper's normalised squared error is 2 + 2 times it, so gradients differ
    by that factor alone.

    Args:
        encoder: the online encoder.
        hidden_dim: hidden width of projector and predictor (paper: 4096).
        output_dim: size of the embeddings (paper: 256).
        ema_momentum: of the moving average at the start; it rises to 1 along a cosine (section 3.3).
    """

    card = Card("BYOL", "predicts the embeddings of a moving average of itself", "arXiv 2006.07733", 2020)

    def __init__(
        self,
        encoder: Encoder,
        *,
        hidden_dim: Annotated[int, Field(ge=1)] = 4096,
        output_dim: Annotated[int, Field(ge=1)] = 256,
        ema_momentum: Annotated[float, Field(ge=0, le=1)] = 0.996,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = BYOLProjectionHead(encoder.feature_dim, hidden_dim, output_dim)
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.momentum_encoder = copy.deepcopy(encoder)
        self.momentum_projector = copy.deepcopy(self.projector)
        deactivate_requires_grad(self.momentum_encoder)
        deactivate_requires_grad(self.momentum_projector)
        self.criterion = NegativeCosineSimilarity()
        self.ema_momentum = ema_momentum

    def project(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, output_dim)."""
        out: Tensor = self.projector(features)
        return out

    def losses(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Symmetrised negative cosine to the momentum branch."""
        first, second = (self.predictor(self.project(self.encoder(view))).float() for view in views)
        with torch.no_grad():
            target_first, target_second = (
                self.momentum_projector(self.momentum_encoder(view)).float() for view in views
            )
        return {"loss": 0.5 * (self.criterion(first, target_second) + self.criterion(second, target_first))}

    def after_step(self, progress: float) -> None:
        """Move the momentum branch: m = 1 - (1 - m0) (cos(pi progress) + 1) / 2."""
        momentum = 1 - (1 - self.ema_momentum) * (math.cos(math.pi * progress) + 1) / 2
        update_momentum(self.encoder, self.momentum_encoder, m=momentum)
        update_momentum(self.projector, self.momentum_projector, m=momentum)
