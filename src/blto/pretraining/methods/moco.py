"""MoCo v2 (He et al., CVPR 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from pydantic import Field
from torch import Tensor

from blto.models.encoder import Encoder
from blto.pretraining.method import SSLMethod
from blto.pretraining.mixing import n_pair
from blto.registry import Card, later_option
from blto.runtime.distributed import gather


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """The cross-entropy of finding each query's own key beside all negatives (arXiv 1911.05722, equation 1).

    Args:
        queries, keys: float32 (B, d) of length 1; row i of both is the same image.
        negatives: float32 (K, d) of length 1.
        temperature: greater than 0.
    """
    with torch.autocast(queries.device.type, enabled=False):  # bf16 would round cosines to 1/256
        own = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat((own, queries @ negatives.T), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Put keys (B, d) in place of the oldest of the queue (K, d); of more than K the last K.

    In place. `pointer`, an integer scalar, is the row of the oldest key before and after: from there on, around the
    end, the queue holds the last keys in the order in which they came.
    """
    keys = keys[-len(queue) :]
    rows = (pointer + torch.arange(len(keys), device=queue.device)) % len(queue)
    queue.index_copy_(0, rows, keys)
    pointer.copy_((pointer + len(keys)) % len(queue))


class MoCo(SSLMethod):
    """A query of one view finds the key of the other among a queue of keys of earlier batches (Algorithm 1).

    The keys come from a moving average of the encoder. The loss is asymmetric, as in the papers: one query and one key
    an image and step. Until the queue is full of keys, random directions fill it.

    The papers shuffle the key batch between GPUs, because queries and keys whose batch norm saw the same few images are
    told apart from the queue by those statistics (arXiv 1911.05722, section 3.3). Here one batch norm sees the whole
    batch, in one process as in several (SyncBatchNorm). No order of the images changes its statistics, so nothing is
    shuffled: the leak is that of one large batch, and it is not removed.

    In several processes the keys of all of them enter every process's queue, in the order of the batch.

    Args:
        encoder: the encoder to train.
        temperature: of the softmax (v2: 0.2; the first paper: 0.07).
        queue_size: keys that serve as negatives (papers: 65536, for ImageNet; 4096 is a twelfth of CIFAR-10). It need
            not be divisible by the batch size.
        ema_momentum: of the moving average, the same in all steps (papers: 0.999, over a million steps).
        hidden_dim: width of the projection head's hidden layer (v2: 2048).
        output_dim: size of the embeddings (papers: 128).
        i_cutmix: alpha of i-CutMix; 0 is without it. With it the other keys of the batch are negatives too.
    """

    card = Card("MoCo v2", "finds one view's key among a queue of earlier ones", "arXiv 2003.04297", 2020)
    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0, le=10)] = 0.2,
        queue_size: Annotated[int, Field(ge=1, le=2**24)] = 4096,
        ema_momentum: Annotated[float, Field(ge=0, le=1)] = 0.99,
        hidden_dim: Annotated[int, Field(ge=1)] = 2048,
        output_dim: Annotated[int, Field(ge=1)] = 128,
        i_cutmix: Annotated[float, Field(ge=0, le=100), later_option(0.0)] = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = MoCoProjectionHead(encoder.feature_dim, hidden_dim, output_dim)
        self.momentum_encoder = copy.deepcopy(encoder)
        self.momentum_projector = copy.deepcopy(self.projector)
        deactivate_requires_grad(self.momentum_encoder)
        deactivate_requires_grad(self.momentum_projector)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, output_dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.temperature, self.ema_momentum, self.i_cutmix = temperature, ema_momentum, i_cutmix
        self._keys: Tensor | None = None  # of this step, on their way into the queue

    def project(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, output_dim)."""
        out: Tensor = self.projector(features)
        return out

    def losses(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """InfoNCE of the first view's queries and the second's keys, against the queue as the last step left it."""
        queries, keys = self._embed(views)
        return {"loss": info_nce(queries, keys, self.queue, self.temperature)}

    def mixed_losses(self, views: Sequence[Tensor], share: Tensor) -> dict[str, Tensor]:
        """The N-pair loss of the first view's queries, mixed, and the second's keys before the queue."""
        queries, keys = self._embed(views)
        return {"loss": n_pair(queries, torch.cat((keys, self.queue)), share, self.temperature)}

    def _embed(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Queries of the first view and keys of the second, which are kept for the queue."""
        queries = F.normalize(self.project(self.encoder(views[0])).float(), dim=1)
        with torch.no_grad():
            keys = F.normalize(self.momentum_projector(self.momentum_encoder(views[1])).float(), dim=1)
        self._keys = keys
        return queries, keys

    def after_step(self, progress: float) -> None:
        """Let this step's keys into the queue and move the momentum branch."""
        if self._keys is not None:
            enqueue(self.queue, self.pointer, gather(self._keys))
            self._keys = None
        update_momentum(self.encoder, self.momentum_encoder, m=self.ema_momentum)
        update_momentum(self.projector, self.momentum_projector, m=self.ema_momentum)
