"""Defenses that change the recipe by which a victim is pretrained: i-CutMix, localized crops, strong augmentation.

They need no encoder and no clean images. What one is worth is what a victim that was trained with it loses in attack
success and in accuracy, beside a clean twin of the same recipe.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from blto.data.views import SIMCLR
from blto.defenses.base import RecipeChange
from blto.defenses.evidence import Evidence
from blto.errors import ConfigError
from blto.pretraining import METHODS
from blto.pretraining.spec import PretrainingSpec
from blto.registry import Card

WHO = "whoever pretrains, on images that may be poisoned"


def changed(spec: PretrainingSpec, key: str, values: dict[str, Any]) -> PretrainingSpec:
    """The recipe with some values of one of its parts replaced; validated, and `spec` as it was."""
    given = spec.model_dump(mode="json")
    return PretrainingSpec.model_validate({**given, key: {**given[key], **values}})


class ICutMix(RecipeChange):
    """Mix a piece of another image into each first view, and want both images found in their shares.

    i-Mix (Lee et al., ICLR 2021, arXiv 2010.08887) with CutMix (Yun et al., ICCV 2019, arXiv 1905.04899). PatchSearch
    (Tejankar et al., CVPR 2023, section 4) trains with it what its filter left. A patch then stands beside other images
    than its own, which weakens what it is bound to. See `blto.pretraining.mixing`; a method's option `i_cutmix` is the
    same.

    Where this differs from the authors' code: an image's partner is the next one of the (randomly ordered) batch. There
    the loss of SimCLR is the N-pair loss, in one direction; PatchSearch's MoCo v3 mixes both views in turn.

    Args:
        alpha: of the Beta distribution of the shares (1, uniform, in PatchSearch).
    """

    card = Card("i-CutMix", "mixes pieces of other images into the views", "arXiv 2010.08887", 2021, WHO)
    evidence = Evidence(
        "With it the lift of one patch falls from 92 to 65 points (linear) and from 27 to 10 (kNN), for less than a "
        "point of accuracy."
    )

    def __init__(self, *, alpha: Annotated[float, Field(gt=0, le=100)] = 1.0) -> None:
        self.alpha = alpha

    def change(self, spec: PretrainingSpec) -> PretrainingSpec:
        """See `RecipeChange.change`. Raises ConfigError for a method that does not contrast images."""
        mixing = [name for name in METHODS.names() if "i_cutmix" in METHODS.schema(name).model_fields]
        if spec.method["name"] not in mixing:
            raise ConfigError(f"i_cutmix is not for method {spec.method['name']}; give one of {', '.join(mixing)}.")
        return changed(spec, "method", {"i_cutmix": self.alpha})


class LocalizedCropping(RecipeChange):
    """Crop the second view inside the first one's crop, a little enlarged, so that both show the same things.

    Zhang et al., "Data Poisoning based Backdoor Attacks to Contrastive Learning" (CorruptEncoder), CVPR 2024, arXiv
    2211.08229, its defense. Two crops that lie apart may show the trigger in one view and the object in the other,
    which binds the two. The option `crop_margin` of a view recipe is the same.

    Where this differs from the authors' code: the first view is always the one that the other is cropped near, where
    theirs swaps the two in half of the cases; a crop that never fits is the region's middle.

    Args:
        margin: by how much of its height and width the first crop is enlarged on each side (0.2).
    """

    card = Card("localized cropping", "crops both views in one place", "arXiv 2211.08229", 2024, WHO)
    evidence = Evidence(
        "With it the lift of one patch falls from 92 to 82 points (linear) and from 27 to 19 (kNN), for four points of "
        "accuracy."
    )

    def __init__(self, *, margin: Annotated[float, Field(ge=0, le=1)] = 0.2) -> None:
        self.margin = margin

    def change(self, spec: PretrainingSpec) -> PretrainingSpec:
        """See `RecipeChange.change`."""
        return changed(spec, "views", {"crop_margin": self.margin})


class StrongAugmentation(RecipeChange):
    """Augment at least as strongly as SimCLR does on ImageNet, with BYOL's solarize.

    Chen et al., ICML 2020, arXiv 2002.05709, appendix A (crops, jitter, blur); Grill et al., NeurIPS 2020, table 6
    (solarize, of the second view). No paper's defense as a whole: whatever of a trigger does not survive its views can
    bind nothing. What a recipe already has stronger stays.

    Args:
        crop: smallest area of a crop, as a share of the image's.
        jitter: of SimCLR's strengths of brightness, contrast, saturation (0.8 each) and hue (0.2).
        blur: probability of a blur, of each view.
        solarize: probability of solarizing later views.
    """

    card = Card("strong augmentation", "smaller crops, stronger jitter, blur, solarize", "arXiv 2002.05709", 2020, WHO)
    evidence = Evidence(
        "With it the lift of one patch falls from 92 to 22 points (linear) and rises from 27 to 51 (kNN), for four "
        "points of accuracy."
    )

    def __init__(
        self,
        *,
        crop: Annotated[float, Field(gt=0, le=1)] = 0.08,
        jitter: Annotated[float, Field(ge=0, le=2.5)] = 1.0,
        blur: Annotated[float, Field(ge=0, le=1)] = 0.5,
        solarize: Annotated[float, Field(ge=0, le=1)] = 0.2,
    ) -> None:
        self.crop, self.jitter, self.blur, self.solarize = crop, jitter, blur, solarize

    def change(self, spec: PretrainingSpec) -> PretrainingSpec:
        """See `RecipeChange.change`."""
        views = spec.views
        strengths = {
            name: max(getattr(views, name), self.jitter * getattr(SIMCLR, name))
            for name in ("brightness", "contrast", "saturation", "hue")
        }
        low, high = views.crop_scale
        first, later = views.solarize_probability
        stronger = {
            **strengths,
            "crop_scale": (min(low, self.crop), high),
            "blur_probability": tuple(max(chance, self.blur) for chance in views.blur_probability),
            "solarize_probability": (first, max(later, self.solarize)),
        }
        return changed(spec, "views", stronger)
