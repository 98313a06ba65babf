"""The configuration of a run that trains a diffusion transformer on images."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from trinity.core.config import RunConfig
from trinity.core.dit_config import DiTConfig
from trinity.core.images_config import ImagesConfig
from trinity.core.tables import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Table,
)


class FlowConfig(Table):
    """Flow matching: at which noise levels to train, and how their errors count."""

    density: Literal["uniform", "logit_normal"] = "logit_normal"
    logit_mean: float = Field(default=0.0, allow_inf_nan=False, description="of logit_normal")
    logit_std: PositiveFloat = Field(default=1.0, description="of logit_normal")
    shift: PositiveFloat = Field(
        default=1.0, description="more than 1 moves training and sampling towards the noise"
    )
    coarse_shift: PositiveFloat = Field(
        default=1.0,
        description="factor on the shift for each doubling of the patch: large patches are used "
        "where there is much noise",
    )
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    condition_dropout: Fraction = Field(
        default=0.1, description="share of images trained without condition, for guidance"
    )


class SamplesConfig(Table):
    """The pictures that are made at the end of a run, and by ``trinity sample-images``."""

    num_steps: Positive = 50
    solver: Literal["euler", "heun", "ancestral"] = "euler"
    guidance: NonNegativeFloat = Field(default=1.0, description="1: none")
    tau: NonNegativeFloat = Field(
        default=0.0,
        description="threshold below which a step takes larger patches, where the model has them; "
        "0: never. `trinity sample-images --calibrate` finds it",
    )
    rho: Fraction = Field(default=0.4, description="quantile over blocks that tau is held against")
    hold_steps: Positive = Field(default=4, description="steps that a patch size is kept")
    fine_last_steps: NonNegative = Field(default=5, description="last steps at the base patch")
    cache: NonNegativeFloat = Field(
        default=0.0,
        description="threshold of the first block cache: relative change of what the first block "
        "adds, below which the other blocks are left out; 0: none",
    )
    columns: Positive = Field(default=10, description="of the grid; one class each, where known")
    rows: Positive = 4


class ImageRunConfig(RunConfig):
    """A run that trains a diffusion transformer."""

    model: DiTConfig
    images: ImagesConfig
    flow: FlowConfig = FlowConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="after")
    def _check_patches(self) -> Self:
        model, images = self.model, self.images
        for scale in model.patch_scales:
            edge = model.patch_size * scale
            if images.height % edge or images.width % edge:
                raise ValueError(
                    f"images of {images.height} x {images.width} are not a whole number of patches "
                    f"of {edge} (model.patch_size={model.patch_size}, scale {scale} of "
                    "model.patch_scales); change one of them"
                )
        if self._num_frames % model.patch_frames:
            raise ValueError(
                f"images.frames={images.frames} (an image counts as one) is no multiple of "
                f"model.patch_frames={model.patch_frames}; change one of them"
            )
        if self._num_frames > model.patch_frames and model.num_axes == 2:
            raise ValueError(
                f"images.frames={images.frames} with model.num_axes=2, which knows no time; set "
                "model.num_axes=3"
            )
        if self.batch.sequence_length < self.tokens_of_image:
            raise ValueError(
                f"batch.sequence_length={self.batch.sequence_length} is less than the "
                f"{self.tokens_of_image} tokens of an image at scale 1; raise it"
            )
        return self

    @property
    def _num_frames(self) -> int:
        return self.images.frames or 1

    @property
    def tokens_of_image(self) -> int:
        """Tokens of one image at scale 1."""
        model, images = self.model, self.images
        frames = self._num_frames // model.patch_frames
        return frames * (images.height // model.patch_size) * (images.width // model.patch_size)

    @property
    def images_per_row(self) -> int:
        """Places for images in a row: as many as it can hold, and two where it holds one and more.

        The model takes a row with one place to be full of one image.
        """
        smallest = self.tokens_of_image // self.model.patch_scales[-1] ** 2
        num_images = self.batch.sequence_length // smallest
        is_full = self.batch.sequence_length == self.tokens_of_image
        return num_images if num_images > 1 or is_full else 2
