"""DECREE: how small a patch makes all features alike? (Feng et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from blto.defenses.base import Conditions, EncoderDetector, Images, Inspection
from blto.defenses.evidence import Evidence
from blto.defenses.inversion import WINDOWS_A_SIDE, Differentiable, MaskedPatch, differentiable, mean_cosine
from blto.models.encoder import Encoder
from blto.pretraining.loop import batch_rows
from blto.registry import Card
from blto.runtime.seeds import stream_seed

THRESHOLD = 0.1
"""A relative mask norm below this is a backdoor (paper, section 5)."""
FIRST_LAMBDA, FACTOR, PATIENCE = 1e-3, 5.0, 5
LEARNING_RATES = ((30, 0.5), (50, 0.1))
"""(epochs, rate) in turn; LAST_RATE afterwards."""
LAST_RATE = 0.05


class Pressure:
    """The weight of the mask's norm: five times as much after five successes in a row, a fifth after five failures.

    Args:
        least: below it the weight is not lowered any more, and after enough successes there it starts anew.
    """

    def __init__(self, least: float) -> None:
        self.least, self.weight = least, FIRST_LAMBDA
        self._up = self._down = self._at_least = 0

    def after(self, success: bool) -> None:
        """Take note of a step."""
        self._at_least = self._at_least + 1 if success and self.weight < self.least else 0
        if self._at_least > 2 * PATIENCE:
            self.weight, self._up, self._down = FIRST_LAMBDA, 0, 0
        self._up, self._down = (self._up + 1, 0) if success else (0, self._down + 1)
        if self._up > PATIENCE:
            self.weight, self._up = self.weight * FACTOR, 0
        elif self._down > PATIENCE:
            self.weight, self._down = (self.weight / FACTOR if self.weight >= self.least else self.weight), 0


class DECREE(EncoderDetector):
    """Invert a mask and a patch that make the features of all stamped images alike; a small mask is suspicious.

    Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023, arXiv 2303.15180, section 4. For images x,
    minimise -mean of cos(f(x_i'), f(x_j')) over pairs + lambda |m|_1, x' = (1 - m) x + m p. The smallest |m|_1 at which
    the cosine was above `similarity`, as a share of the largest there can be, is the P L1-norm; `score` is 1 less that.
    Where the cosine is never reached there is no trigger, and the score is 0.

    Where this differs from the authors' code: the last, incomplete batch of an epoch is left out, and the steps run in
    bf16 where that is faster. `starts` and `begin` are ours: from a random mask over the whole image the search often
    ends far from a small patch that is there.

    Args:
        images: clean images to stamp (the code: 1,000 of CIFAR-10's test images).
        epochs: at most (1,000); it stops when the mask has not shrunk for `patience` steps.
        batch_size: 128.
        similarity: 0.99.
        least_lambda: floor of lambda: 1e-5 at 32 pixels, 1e-7 at 224.
        patience: 10 at 32 pixels, 35 at 224.
        starts: how often it begins anew (1), the smallest mask counting.
        begin: where a mask starts: "random" over the whole image, or one after the other in nine "windows" of half its
            side, which together cover it.
    """

    card = Card(
        "DECREE",
        "how small a patch makes the features of all images alike",
        "arXiv 2303.15180",
        2023,
        "the encoder and clean images without labels",
    )
    evidence = Evidence(
        "Begun in windows, as the scan does, it finds nine of ten BadEncoders with trucks as the target and eight of "
        "ten with a class each, with the paper's one random start two of the former; of twelve patches in training "
        "images it flags one, of BLTO's encoders none.",
        must_show="test_decree::test_a_planted_patch_is_found_and_far_smaller_than_what_a_clean_encoder_needs",
        positive="test_decree::test_windows_find_a_patch_where_one_random_start_misses_it",
    )

    def __init__(
        self,
        *,
        images: Annotated[int, Field(ge=2)] = 1000,
        epochs: Annotated[int, Field(ge=1)] = 1000,
        batch_size: Annotated[int, Field(ge=2)] = 128,
        similarity: Annotated[float, Field(gt=0, lt=1)] = 0.99,
        least_lambda: Annotated[float, Field(gt=0)] = 1e-5,
        patience: Annotated[int, Field(ge=1)] = 10,
        starts: Annotated[int, Field(ge=1)] = 1,
        begin: Literal["random", "windows"] = "random",
    ) -> None:
        self.images, self.epochs, self.batch_size = images, epochs, min(batch_size, images)
        self.similarity, self.least_lambda = similarity, least_lambda
        self.patience, self.starts, self.begin = patience, starts, begin

    def inspect(self, encoder: Encoder, images: Images, conditions: Conditions) -> Inspection:
        """See `EncoderDetector.inspect`. Measures: `steps`, and where there is a trigger `relative_norm` and `cosine`.

        Of several starts the one with the smallest mask counts.
        """
        seed, best, steps = stream_seed(conditions.seed, "defense", "decree"), _Best(), 0
        with (
            differentiable(encoder, conditions.device) as features,
            conditions.progress.bar("DECREE", self.starts * self.epochs) as advance,
        ):
            for start in range(self.starts):
                found = _Best()
                for epoch, taken in self._invert(features, images, seed, start, found):
                    steps += taken
                    advance(start * self.epochs + epoch + 1, found.told())
                if found.norm is not None and (best.norm is None or found.norm < best.norm):
                    best = found
        if best.norm is None:
            return Inspection(0.0, flagged=False, measures={"steps": steps})
        share = best.norm / (3 * images.shape[-1] ** 2)
        measures = {"relative_norm": share, "cosine": best.cosine, "steps": steps}
        return Inspection(1 - share, share < THRESHOLD, measures, best.trigger)

    def _invert(
        self, features: Differentiable, images: Images, seed: int, start: int, best: _Best
    ) -> Iterator[tuple[int, int]]:
        """One start: yields each epoch with its number of steps, and keeps the smallest mask in `best`."""
        seed = stream_seed(seed, "defense", start)
        window = start % WINDOWS_A_SIDE**2 if self.begin == "windows" else None
        stamp = MaskedPatch(images.shape[-1], torch.Generator().manual_seed(seed), window).to(features.device)
        optimizer = torch.optim.Adam(stamp.parameters(), betas=(0.5, 0.9))
        pressure, unchanged = Pressure(self.least_lambda), 0
        for epoch in range(self.epochs):
            optimizer.param_groups[0]["lr"] = next((rate for end, rate in LEARNING_RATES if epoch < end), LAST_RATE)
            cosines = []
            for batch in range(len(images) // self.batch_size):
                rows = batch_rows(len(images), self.batch_size, seed=seed, epoch=epoch, batch=batch)
                pixels = torch.from_numpy(images[rows]).to(features.device).float().div_(255)
                cosine, norm = mean_cosine(features(stamp(pixels))), 3 * stamp.mask.sum()
                optimizer.zero_grad(set_to_none=True)
                (pressure.weight * norm - cosine).backward()  # type: ignore[no-untyped-call]
                cosines.append(float(cosine.detach()))
                is_alike = cosines[-1] > self.similarity
                shrunk = is_alike and best.keep(stamp, float(norm.detach()), cosines[-1])
                optimizer.step()
                unchanged = 0 if shrunk or best.norm is None else unchanged + 1
                pressure.after(is_alike)
            yield epoch, len(cosines)
            if float(np.mean(cosines)) > self.similarity and unchanged > self.patience:
                return


class _Best:
    """The smallest mask so far with which images were alike."""

    def __init__(self) -> None:
        self.norm: float | None = None
        self.cosine = 0.0
        self.trigger: dict[str, Tensor] = {}

    def told(self) -> str:
        """For the progress bar."""
        return "no trigger yet" if self.norm is None else f"mask {self.norm:.0f}"

    def keep(self, stamp: MaskedPatch, norm: float, cosine: float) -> bool:
        """Whether this one is smaller; then it is kept."""
        if self.norm is not None and norm >= self.norm:
            return False
        self.norm, self.cosine, self.trigger = norm, cosine, stamp.kept()
        return True
