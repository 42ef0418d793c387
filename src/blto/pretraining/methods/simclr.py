"""SimCLR (Chen et al., ICML 2020, arXiv 2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import SimCLRProjectionHead
from pydantic import Field
from torch import Tensor

from blto.models.encoder import Encoder
from blto.pretraining.method import SSLMethod
from blto.pretraining.mixing import n_pair
from blto.registry import Card, later_option
from blto.runtime.distributed import gather, process_number


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross-entropy of two views' embeddings (B, d) each (equation 1).

    Every embedding is to find the other view of its image among the 2B - 1 others by cosine similarity. Where several
    processes train together, the others are those of all processes and the mean is over this one's embeddings: the mean
    of the processes' losses, and of their gradients, is that of one process with the whole batch.
    """
    embeddings = F.normalize(torch.cat((first, second)).float(), dim=1)
    everyone, start = gather(embeddings), process_number() * len(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):  # bf16 would round cosines to 1/256
        logits = (embeddings @ everyone.T) / temperature
    logits.detach().diagonal(start).fill_(-torch.inf)  # nothing is its own partner; no gradient comes from there
    partners = torch.arange(start, start + len(logits), device=logits.device).roll(len(first))
    return F.cross_entropy(logits, partners)


class SimCLR(SSLMethod):
    """NT-Xent over two views; all views go through the encoder in one batch, as in the authors' code.

    Args:
        encoder: the encoder to train.
        temperature: of the softmax in NT-Xent (paper section 2.1; 0.5 is its best for CIFAR-10, appendix B.9).
        hidden_dim: width of the projection head's hidden layer.
        output_dim: size of the embeddings.
        i_cutmix: alpha of i-CutMix; 0 is without it. With it the loss is i-Mix's N-pair loss instead of NT-Xent.
    """

    views_per_pass = 2
    card = Card("SimCLR", "contrasts two views of an image with all others of the batch", "arXiv 2002.05709", 2020)

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0, le=10)] = 0.5,
        hidden_dim: Annotated[int, Field(ge=1)] = 512,
        output_dim: Annotated[int, Field(ge=1)] = 128,
        i_cutmix: Annotated[float, Field(ge=0, le=100), later_option(0.0)] = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = SimCLRProjectionHead(encoder.feature_dim, hidden_dim, output_dim)
        self.temperature, self.i_cutmix = temperature, i_cutmix

    def project(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, output_dim)."""
        out: Tensor = self.projector(features)
        return out

    def losses(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """NT-Xent of two views."""
        first, second = self.project(self.encoder(torch.cat(tuple(views)))).chunk(2)
        return {"loss": nt_xent(first, second, self.temperature)}

    def mixed_losses(self, views: Sequence[Tensor], share: Tensor) -> dict[str, Tensor]:
        """The N-pair loss of the first view, mixed, and the second one."""
        embeddings = F.normalize(self.project(self.encoder(torch.cat(tuple(views)))).float(), dim=1)
        queries, keys = embeddings.chunk(2)
        return {"loss": n_pair(queries, keys, share, self.temperature)}
