"""SimSiam (Chen and He, CVPR 2021, arXiv 2011.10566)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from pydantic import Field
from torch import Tensor

from blto.models.encoder import Encoder
from blto.pretraining.method import SSLMethod
from blto.registry import Card


class SimSiam(SSLMethod):
    """Symmetrised negative cosine between a predicted view and the other view behind a stop-gradient (Algorithm 1).

    Args:
        encoder: the encoder to train.
        hidden_dim: hidden width of the projector (paper: 2048).
        output_dim: size of the embeddings (paper: 2048).
        predictor_dim: bottleneck of the predictor (paper: 512, a quarter of the output).
    """

    card = Card("SimSiam", "predicts one view from the other behind a stop-gradient", "arXiv 2011.10566", 2021)

    def __init__(
        self,
        encoder: Encoder,
        *,
        hidden_dim: Annotated[int, Field(ge=1)] = 2048,
        output_dim: Annotated[int, Field(ge=1)] = 2048,
        predictor_dim: Annotated[int, Field(ge=1)] = 512,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = SimSiamProjectionHead(encoder.feature_dim, hidden_dim, output_dim)
        self.predictor = SimSiamPredictionHead(output_dim, predictor_dim, output_dim)
        self.criterion = NegativeCosineSimilarity()

    def project(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, output_dim)."""
        out: Tensor = self.projector(features)
        return out

    def losses(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Negative cosine, and the spread of the embeddings (1 / sqrt(d) is healthy, 0 is collapse; section 4.1)."""
        first, second = (self.project(self.encoder(view)) for view in views)
        predicted_first, predicted_second = self.predictor(first), self.predictor(second)
        loss = 0.5 * (
            self.criterion(predicted_first.float(), second.detach().float())
            + self.criterion(predicted_second.float(), first.detach().float())
        )
        return {"loss": loss, "spread": F.normalize(first.detach().float(), dim=1).std(dim=0).mean()}
