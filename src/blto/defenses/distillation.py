"""Distillation: a fresh student learns from the encoder on clean images alone (Saha et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from blto.data.views import RECIPES
from blto.defenses.base import Conditions, EncoderRepair, Images
from blto.defenses.evidence import Evidence
from blto.defenses.ssl_training import fresh, train
from blto.models.encoder import Encoder
from blto.pretraining.method import SSLMethod
from blto.pretraining.methods.moco import enqueue
from blto.pretraining.spec import OptimizerSpec, PretrainingSpec, ViewsField
from blto.registry import Card
from blto.runtime.seeds import seeded, stream_seed

WARMUP = 0.05
"""Share of the training."""


def mismatch(goal: Tensor, own: Tensor, goal_anchors: Tensor, own_anchors: Tensor, temperature: float) -> Tensor:
    """Mean KL(p || q) over images, p and q the softmax of an image's similarities to the anchors.

    Args:
        goal, own: float32 (B, D) of length 1, of the teacher and the student.
        goal_anchors, own_anchors: float32 (K, D) of length 1; row j of both is the same image.
        temperature: of both.
    """
    with torch.autocast(own.device.type, enabled=False):  # bf16 would round cosines to 1/256
        p, q = ((each @ anchors.T / temperature) for each, anchors in ((goal, goal_anchors), (own, own_anchors)))
    return F.kl_div(q.log_softmax(dim=1), p.log_softmax(dim=1), reduction="batchmean", log_target=True)


class SimilarityMatching(SSLMethod):
    """The student is to be as near to images of earlier batches as the teacher is. Both see the same views.

    Args:
        encoder: the student.
        teacher: frozen, in evaluation mode.
        queue: how many earlier views are compared with; random directions until there are so many.
        temperature: of the similarities' softmax.
    """

    views_per_pass = 2
    anchors: Tensor
    pointer: Tensor

    def __init__(self, encoder: Encoder, teacher: Encoder, *, queue: int, temperature: float) -> None:
        super().__init__()
        self.encoder, self.teacher = encoder, teacher.eval().requires_grad_(False)
        self.register_buffer("anchors", F.normalize(torch.randn(queue, encoder.feature_dim), dim=1).repeat(1, 2))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.temperature = temperature
        self._keys: Tensor | None = None  # of this step, on their way into the queue

    def train(self, mode: bool = True) -> Self:
        """The student's mode; the teacher's batch norm is never trained."""
        super().train(mode)
        self.teacher.eval()
        return self

    def project(self, features: Tensor) -> Tensor:
        """The features themselves: what the student is for."""
        return features

    def losses(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        """The mismatch, over all views."""
        images = torch.cat(tuple(views))
        with torch.no_grad():
            goal = F.normalize(self.teacher(images).float(), dim=1)
        own = F.normalize(self.encoder(images).float(), dim=1)
        self._keys = torch.cat((goal, own.detach()), dim=1)
        goal_anchors, own_anchors = self.anchors.chunk(2, dim=1)
        return {"loss": mismatch(goal, own, goal_anchors, own_anchors, self.temperature)}

    def after_step(self, progress: float) -> None:
        """Let this step's views into the queue."""
        if self._keys is not None:
            enqueue(self.anchors, self.pointer, self._keys)
            self._keys = None


class Distillation(EncoderRepair):
    """Train a fresh encoder of the same architecture to see the clean images' similarities as the given one does.

    Saha et al., "Backdoor Attacks on Self-Supervised Learning", CVPR 2022, arXiv 2105.10123, by CompRess
    (Koohpayegani et al., NeurIPS 2020, arXiv 2010.14713), with two queues. For a view x and anchors a_j, views of
    earlier batches, the student minimises KL(p || q), p_j ~ exp(cos(t(x), t(a_j)) / T) of the teacher and q_j the same
    of the student. What the teacher does with a trigger is never asked, so nothing teaches it to the student.

    The student's weights are drawn anew, and its batch norm learns from nothing: only the normalisation of the pixels
    is the teacher's, which is left as it was and thrown away.

    Where this differs from the authors' code: SGD's rate falls along half a cosine from a higher peak, with a warm-up
    (theirs: 0.01 in steps, 130 epochs of ImageNet); two views an image and step, with color jitter (crop and flip); the
    queue is smaller (128,000), and student and teacher begin with the same random directions in it.

    Args:
        images: clean images to train on (the paper: 25, 10 and 5% of the training set).
        views: the augmentation.
        epochs: passes over the images. Fewer images need more passes.
        batch_size: images a step; all where there are fewer.
        lr: peak learning rate of SGD with momentum 0.9.
        queue: views that an image is compared with.
        temperature: T (0.04).
    """

    card = Card(
        "distillation",
        "a fresh encoder learns the similarities of clean images from the given one",
        "arXiv 2105.10123",
        2022,
        "the encoder and clean images without labels",
    )
    evidence = Evidence(
        "With a tenth of the clean images a student of one patch victim has no lift left, of one BadEncoder 13 points, "
        "for 9 and 15 points of accuracy; BLTO's trigger works less on it, and as much less on a clean one's.",
        must_show="test_distillation::test_the_student_never_sees_a_poison",
        positive="test_distillation::test_the_student_learns_the_teachers_similarities_and_not_its_backdoor",
    )

    def __init__(
        self,
        *,
        images: Annotated[int, Field(ge=2)] = 5000,
        views: ViewsField = RECIPES["simsiam_cifar"],
        epochs: Annotated[int, Field(ge=1, le=100_000)] = 16,
        batch_size: Annotated[int, Field(ge=2, le=65_536)] = 64,
        lr: Annotated[float, Field(gt=0)] = 0.1,
        queue: Annotated[int, Field(ge=2, le=2**24)] = 2048,
        temperature: Annotated[float, Field(gt=0, le=10)] = 0.04,
    ) -> None:
        self.images, self.views, self.epochs, self.batch_size = images, views, epochs, batch_size
        self.lr, self.queue, self.temperature = lr, queue, temperature

    def repair(self, encoder: Encoder, images: Images, conditions: Conditions) -> Encoder:
        """See `EncoderRepair.repair`.

        Raises:
            InputRefused: an architecture of which no fresh copy can be made.
            Diverged: the loss becomes NaN or Inf.
        """
        seed = stream_seed(conditions.seed, "defense", "distillation")
        student = fresh(encoder, seed)
        with seeded(seed):
            method = SimilarityMatching(student, encoder, queue=self.queue, temperature=self.temperature)
        spec = PretrainingSpec(
            views=self.views,
            optimizer=OptimizerSpec(lr=self.lr),
            batch_size=min(self.batch_size, len(images)),
            epochs=self.epochs,
            warmup_epochs=WARMUP * self.epochs,
        )
        return train(method, images, spec, conditions, title="distil on clean images")
