"""The surrogate's features as the outer steps see them: in one layer, with one way to normalise batches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blto.attacks.objective import batch_statistics, held
from blto.pretraining.trainer import Trainer


@dataclass(frozen=True)
class FeatureSpace:
    """Views (B, 3, S, S) in [0, 1] to float32 features (B, D); weights and running statistics stay as they are.

    Args:
        surrogate: whose features.
        layer: the encoder's "features" or the projector's "embeddings".
        batch_norm: "eval" normalises with the running statistics, "batch" with those of what is embedded together.
    """

    surrogate: Trainer
    layer: Literal["features", "embeddings"]
    batch_norm: Literal["eval", "batch"]

    @torch.no_grad()
    def fixed(self, views: Tensor) -> Tensor:
        """Features without a gradient."""
        self._evaluate()
        with batch_statistics(self.surrogate.method) if self.batch_norm == "batch" else nullcontext():
            return self._embed(views)

    def differentiable(self, views: Tensor) -> Tensor:
        """Features through which a gradient flows to the views, normalised with the running statistics."""
        self._evaluate()
        with held([parameter for group in self.surrogate.optimizer.param_groups for parameter in group["params"]]):
            return self._embed(views)

    def together(self, triggered: Tensor, references: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of three batches of equal size; with "batch" one gradient reaches all three."""
        if self.batch_norm == "batch":
            with batch_statistics(self.surrogate.method):
                first, second, third = self._embed(torch.cat((triggered, references, clean))).chunk(3)
            return first, second, third
        second, third = self.fixed(torch.cat((references, clean))).chunk(2)
        return self.differentiable(triggered), second, third

    def _evaluate(self) -> None:
        """Evaluation mode; to look first is cheaper than to walk through all modules in every step."""
        if self.surrogate.method.training:
            self.surrogate.method.eval()

    def _embed(self, views: Tensor) -> Tensor:
        method = self.surrogate.method
        with self.surrogate.fabric.autocast():
            features = method.encoder(views)
            return (method.project(features) if self.layer == "embeddings" else features).float()
