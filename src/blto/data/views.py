"""Augmented views: recipes, the parameters drawn for each sample, and the two back ends that apply them.

A view is a random resized crop, a flip, color jitter in random order, grayscale, blur and solarize, in that order, with
torchvision's definition of each (bilinear without antialias). The parameters are a function of (seed, epoch, sample,
view) alone, so they depend neither on the batch nor on what was drawn before. The fast back end reads uint8 and is for
training; the differentiable one reads floats and lets gradients flow to the images. Both give the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from blto.data.view_backends import batched, fast, gradient
from blto.errors import ConfigError, InputRefused, nearest
from blto.registry import later_option, validate
from blto.runtime.kernels import split
from blto.runtime.seeds import numpy_generator

Array = np.ndarray[Any, Any]
Probability = Annotated[float, Field(ge=0, le=1)]
PerView = Annotated[
    tuple[Probability, Probability],
    BeforeValidator(lambda value: (value, value) if isinstance(value, int | float) else value),
]
MASK = (1 << 64) - 1


class ViewRecipe(BaseModel):
    """What a view may be; probabilities in [0, 1], jitter strengths as in torchvision's `ColorJitter`.

    Attributes:
        crop_scale: area of the crop, a share of the image's, (low, high).
        crop_ratio: width of the crop / its height, (low, high).
        flip: probability of a horizontal flip.
        jitter_probability: of color jitter, whose four strengths follow.
        brightness, contrast, saturation: the factor is drawn from 1 - strength to 1 + strength.
        hue: largest shift, as a fraction of the color circle.
        grayscale_probability: of taking the color away.
        blur_probability: of Gaussian blur: the first view's and all later views'; one number stands for both.
        blur_sigma: of the blur, in pixels, (low, high).
        solarize_probability: of inverting what is above the threshold; per view as for the blur.
        solarize_threshold: a fraction of the pixel range.
        jitter_coin: whether color jitter happens is drawn for each "sample", or once for each view of a "batch", as in
            CTRL's code; the strengths are each sample's own in both.
        crop_margin: null draws every view's crop from the whole image. A number draws those of later views from the
            first view's crop, enlarged all around by this share of its height and width (localized cropping).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    jitter_probability: Probability = 0.8
    brightness: Annotated[float, Field(ge=0)] = 0.4
    contrast: Annotated[float, Field(ge=0)] = 0.4
    saturation: Annotated[float, Field(ge=0)] = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grayscale_probability: Probability = 0.2
    blur_probability: PerView = (0.5, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: PerView = (0.0, 0.0)
    solarize_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    jitter_coin: Annotated[Literal["sample", "batch"], later_option("sample")] = "sample"
    crop_margin: Annotated[Annotated[float, Field(ge=0, le=1)] | None, later_option(None)] = None

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        for name, limit in (("crop_scale", 1.0), ("crop_ratio", np.inf), ("blur_sigma", np.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= limit:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= {limit}, not {(low, high)}")
        return self


# Moderate jitter and crops from a fifth of the image: MoCo v2 (Chen et al., 2020, sec. 3; its code) and, after it,
# SimSiam (Chen and He, CVPR 2021, app. A).
MOCOV2 = ViewRecipe()
# SimCLR (Chen et al., ICML 2020, app. A): crops from 8 % of the image, jitter at strength 1.
SIMCLR = ViewRecipe(crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
# BYOL (Grill et al., NeurIPS 2020, table 6): the views differ in blur and solarize.
BYOL = ViewRecipe(crop_scale=(0.08, 1.0), saturation=0.2, blur_probability=(1.0, 0.1), solarize_probability=(0.0, 0.2))
NO_BLUR = (0.0, 0.0)
RECIPES: dict[str, ViewRecipe] = {
    "simclr": SIMCLR,
    "simsiam": MOCOV2,
    "byol": BYOL,
    "mocov2": MOCOV2,
    # SimCLR app. B.9: strength 0.5, no blur.
    "simclr_cifar": ViewRecipe(crop_scale=(0.08, 1.0), blur_probability=NO_BLUR),
    # SimSiam app. D: as on ImageNet, no blur.
    "simsiam_cifar": ViewRecipe(blur_probability=NO_BLUR),
    # No values in the paper; those of solo-learn (da Costa et al., JMLR 2022): table 6 without blur.
    "byol_cifar": BYOL.model_copy(update={"blur_probability": NO_BLUR}),
    # MoCo's CIFAR-10 demo (facebookresearch/moco): torchvision's default crop, no blur.
    "mocov2_cifar": ViewRecipe(crop_scale=(0.08, 1.0), blur_probability=NO_BLUR),
}


def resolve_recipe(spec: str | Mapping[str, Any]) -> ViewRecipe:
    """The recipe behind a name, or behind `{"name": ..., **overrides}`.

    Raises:
        ConfigError: unknown name or key, or a value out of range; the message has the nearest known name.
    """
    given: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(f'views.name: unknown view recipe "{name}"; {nearest(str(name), RECIPES)}.')
    return validate(ViewRecipe, RECIPES[name].model_dump() | given, "views")


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """What was drawn for each of B samples; `image_size` is the (H, W) that the boxes refer to.

    `order` lists the jitter steps as applied, `factors` is indexed by step: 0 brightness, 1 contrast, 2 saturation (1 =
    unchanged), 3 hue (a fraction of the circle, 0 = unchanged). `blur_sigma` 0 and `solarize_threshold` > 1 mean none.
    """

    image_size: tuple[int, int]
    box: Array  # (B, 4) int32: y, x, h, w in pixels
    flip: Array  # (B,) bool
    order: Array  # (B, 4) int8
    factors: Array  # (B, 4) float32
    gray: Array  # (B,) bool
    blur_sigma: Array  # (B,) float32, pixels of the output
    solarize_threshold: Array  # (B,) float32

    def __len__(self) -> int:
        return len(self.box)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The seven arrays, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self)[1:])


def draw(
    recipe: ViewRecipe, *, seed: int, epoch: int, samples: Array, view: int, image_size: tuple[int, int]
) -> ViewParameters:
    """Draw the parameters of one view of each sample: a function of (seed, epoch, sample, view) alone.

    (With `jitter_coin` "batch" also of the batch's first sample, which stands for the batch.)

    Args:
        recipe: what to draw from.
        seed: the run's seed for augmentation, any integer of up to 64 bits.
        epoch: from 0.
        samples: (B,) int64, which sample each row is.
        view: from 0; it also selects the `PerView` values.
        image_size: (H, W) of the source images.
    """
    later = min(view, 1)
    chances = np.array(
        [
            recipe.flip,
            recipe.jitter_probability,
            recipe.grayscale_probability,
            recipe.blur_probability[later],
            recipe.solarize_probability[later],
        ]
    )
    if recipe.jitter_coin == "batch":
        coin = numpy_generator(seed & MASK, "pretrain", "jitter", epoch, view, int(samples[0]) if len(samples) else 0)
        chances[1] = coin.random() < recipe.jitter_probability
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    ranges = np.array([(max(0.0, 1 - s), 1 + s) for s in strengths] + [(-recipe.hue, recipe.hue)])
    samples = np.ascontiguousarray(samples, dtype=np.int64)
    count = len(samples)
    parameters = ViewParameters(
        (int(image_size[0]), int(image_size[1])),
        np.empty((count, 4), np.int32),
        np.empty(count, np.bool_),
        np.empty((count, 4), np.int8),
        np.empty((count, 4), np.float32),
        np.empty(count, np.bool_),
        np.empty(count, np.float32),
        np.empty(count, np.float32),
    )
    fast.draw_parameters(
        np.uint64(seed & MASK),
        np.uint64(epoch),
        np.uint64(view),
        frozen(samples),
        *parameters.image_size,
        np.array(recipe.crop_scale),
        np.array(recipe.crop_ratio),
        chances,
        ranges,
        np.array(recipe.blur_sigma),
        recipe.solarize_threshold,
        -1.0 if recipe.crop_margin is None else float(recipe.crop_margin),
        parameters.arrays,
    )
    return parameters


class Views:
    """Draws and applies the views of one recipe.

    Args:
        recipe: see `ViewRecipe`.
        size: side S of the square views; also of the source images unless `draw` is told otherwise.

    Raises:
        ConfigError: a size below 4, where a blur has no border to reflect.
    """

    def __init__(self, recipe: ViewRecipe, size: int) -> None:
        if size < 4:
            raise ConfigError(f"views: size {size} is below 4 pixels; give the side of the images.")
        self.recipe = recipe
        self.size = size
        self.blur_radius = max(1, size // 20)  # SimCLR app. A: a kernel of a tenth of the image; 23 at 224

    def draw(
        self, *, seed: int, epoch: int, samples: Array, view: int, image_size: tuple[int, int] | None = None
    ) -> ViewParameters:
        """See `draw`; `image_size` defaults to (S, S)."""
        source = image_size or (self.size, self.size)
        return draw(self.recipe, seed=seed, epoch=epoch, samples=samples, view=view, image_size=source)

    def fast(self, images: Array, rows: Array, params: ViewParameters) -> Tensor:
        """Views of `images[rows]`, gathered inside the kernel on torch's number of threads.

        Args:
            images: uint8 (N, 3, H, W), C-contiguous, may be memory-mapped.
            rows: (B,) int64, one per row of `params`.
            params: what `draw` returned.

        Returns:
            float32 (B, 3, S, S) in [0, 1], channels-last in memory.

        Raises:
            InputRefused: not uint8 (N, 3, H, W), another size than `params` was drawn for, or rows out of range.
        """
        images, rows = np.asarray(images), np.ascontiguousarray(rows, dtype=np.int64)
        if images.dtype != np.uint8 or not images.flags.c_contiguous:
            layout = "" if images.flags.c_contiguous else "non-contiguous "
            raise InputRefused(f"views: {layout}{images.dtype} images; give contiguous uint8 (N, 3, H, W).")
        check_shape(images.shape, rows.shape, params)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(images):
            raise InputRefused(f"views: rows {rows.min()} to {rows.max()} are not all within {len(images)} images.")
        out = torch.empty((len(rows), 3, self.size, self.size), memory_format=torch.channels_last)
        target = out.permute(0, 2, 3, 1).numpy()
        arguments = (frozen(images), frozen(rows), tuple(map(frozen, params.arrays)), self.blur_radius, target)
        split(fast.render, len(rows), *arguments)
        return out

    def differentiable(self, images: Tensor, params: ViewParameters) -> Tensor:
        """Views of float images (B, 3, H, W) in [0, 1], differentiable in the images, on their device.

        float32 on a CPU goes through compiled kernels and is differentiable once; the rest is batched torch operations.

        Returns:
            (B, 3, S, S) in [0, 1]; float64 stays, other types become float32.

        Raises:
            InputRefused: not (B, 3, H, W), or another B or size than `params` was drawn for.
        """
        check_shape(images.shape, images.shape[:1], params)
        if images.dtype == torch.float32 and images.device.type == "cpu":
            arrays = tuple(map(frozen, params.arrays))
            views: Tensor = gradient.RenderFloat.apply(images, arrays, self.size, self.blur_radius)
            return views
        parameters, blurs = batched.pack(params.arrays).to(images.device), bool((params.blur_sigma > 0).any())
        return batched.apply(images, parameters, size=self.size, blur_radius=self.blur_radius, blurs=blurs)


def check_shape(images: tuple[int, ...], rows: tuple[int, ...], params: ViewParameters) -> None:
    """Refuse images that the boxes of `params` may reach beyond."""
    if len(images) != 4 or images[1] != 3 or tuple(images[2:]) != params.image_size or tuple(rows) != (len(params),):
        height, width = params.image_size
        raise InputRefused(
            f"views: images {tuple(images)} with rows {tuple(rows)} were given, but the parameters are for "
            f"{len(params)} images (3, {height}, {width}); draw with the images' size."
        )


def frozen(array: Array) -> Array:
    """A read-only view: numba compiles a kernel once for each kind of array, so all inputs are of one kind."""
    view = array.view()
    view.flags.writeable = False
    return view
