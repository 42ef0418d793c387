"""Clean fine-tuning: go on training on images that nobody has poisoned."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from blto.data.views import RECIPES
from blto.defenses.base import Conditions, EncoderRepair, Images
from blto.defenses.evidence import Evidence
from blto.defenses.ssl_training import go_on_training
from blto.models.encoder import Encoder
from blto.pretraining import METHODS
from blto.pretraining.spec import OptimizerSpec, PretrainingSpec, ViewsField, component
from blto.registry import Card


class CleanFineTuning(EncoderRepair):
    """Go on training by a self-supervised loss, with a fresh head, on the clean images alone.

    The plainest of repairs, which others are compared with: Liu et al., "Fine-Pruning", RAID 2018, arXiv 1805.12185,
    fine-tune a classifier on clean images with their labels. There are none here, so the loss is that of pretraining.
    It is the pretraining loop: every weight is trained, the rate falls along half a cosine, and batch norm learns, its
    running statistics with it, which become those of views of the clean images.

    Args:
        images: clean images to train on (a tenth of CIFAR-10's).
        method: name and arguments of an entry of METHODS.
        views: the augmentation.
        epochs: passes over the images; 0 leaves the encoder as it is. Fewer images need more passes.
        batch_size: images a step; all where there are fewer.
        lr: peak learning rate of SGD with momentum 0.9.
    """

    card = Card(
        "clean fine-tuning",
        "go on training by a self-supervised loss on clean images",
        "arXiv 1805.12185",
        2018,
        "the encoder and clean images without labels",
    )
    evidence = Evidence(
        "With 1 to 10% of the clean images the ASR of three patch victims falls from 67-99% to 11-15% and of three "
        "BadEncoders from 96-99% to 3-10% (linear; kNN 4-21%), for one to two points of accuracy; BLTO's stays.",
        must_show="test_clean_fine_tuning::test_zero_epochs_change_nothing_and_what_is_given_is_left_alone",
        positive="test_clean_fine_tuning::test_a_taught_backdoor_gets_weaker",
    )

    def __init__(
        self,
        *,
        images: Annotated[int, Field(ge=2)] = 5000,
        method: component(METHODS) = "simclr",  # type: ignore[valid-type]  # made from the registry
        views: ViewsField = RECIPES["simsiam_cifar"],
        epochs: Annotated[int, Field(ge=0, le=100_000)] = 10,
        batch_size: Annotated[int, Field(ge=2, le=65_536)] = 128,
        lr: Annotated[float, Field(gt=0)] = 0.2,
    ) -> None:
        self.images, self.method, self.views = images, method, views
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr

    def repair(self, encoder: Encoder, images: Images, conditions: Conditions) -> Encoder:
        """See `EncoderRepair.repair`. Raises Diverged where the loss becomes NaN or Inf."""
        if self.epochs == 0:
            return encoder
        spec = PretrainingSpec(
            method=self.method,
            views=self.views,
            optimizer=OptimizerSpec(lr=self.lr),
            batch_size=min(self.batch_size, len(images)),
            epochs=self.epochs,
        )
        return go_on_training(encoder, images, spec, conditions, title="fine-tune on clean images")
