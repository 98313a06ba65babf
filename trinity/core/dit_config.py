"""``[model]`` of a diffusion transformer: the backbone's keys, and how images become its tokens."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from trinity.core.model_config import BackboneConfig
from trinity.core.tables import NonNegative, Positive


class DiTConfig(BackboneConfig):
    """Shape of a diffusion transformer on the backbone (Peebles and Xie, arXiv 2212.09748).

    ``sliding_window`` is a side: a local layer's token sees the square of so many base tokens a
    side around it, in its own frame of a video.
    """

    is_image: ClassVar[bool] = True

    channels: Positive = Field(description="channels of an image or latent")
    patch_size: Positive = Field(default=2, description="edge of a base patch, in pixels")
    patch_frames: Positive = Field(default=1, description="frames of a patch, of videos")
    patch_scales: tuple[Positive, ...] = Field(
        default=(1,), description="edges of all patches in base patches, ascending from 1"
    )
    num_axes: Literal[2, 3] = Field(default=2, description="2: images. 3: videos")
    condition: Literal["none", "class", "embedding"] = "class"
    num_classes: NonNegative = Field(default=0, description="of condition class")
    embedding_width: NonNegative = Field(
        default=0, description="of condition embedding, such as a pooled text encoder's"
    )
    time_width: Positive = Field(default=256, description="sines and cosines of sigma; even")
    rotate_global: bool = Field(
        default=False,
        description="rotary positions in full_attention layers too; for models without local ones",
    )
    load_buckets: Positive = Field(
        default=4, description="equal ranges of sigma whose experts' loads are told apart"
    )

    @model_validator(mode="after")
    def _check_image(self) -> Self:
        scales = self.patch_scales
        if scales[:1] != (1,) or list(scales) != sorted(set(scales)):
            raise ValueError(f"patch_scales={list(scales)} must ascend and begin with 1")
        if (self.condition == "class") != (self.num_classes > 0):
            raise ValueError(
                f"condition={self.condition!r} with num_classes={self.num_classes}: give the "
                "number of classes for condition class, and only then"
            )
        if (self.condition == "embedding") != (self.embedding_width > 0):
            raise ValueError(
                f"condition={self.condition!r} with embedding_width={self.embedding_width}: give "
                "the width for condition embedding, and only then"
            )
        if self.time_width % 2:
            raise ValueError(f"time_width={self.time_width} must be even")
        if self.head_dim < 2 * self.num_axes:
            raise ValueError(f"head_dim={self.head_dim} has too few channels to rotate by position")
        return self

    @property
    def patch_values(self) -> tuple[int, ...]:
        """Values of a patch of each scale."""
        base = self.channels * self.patch_frames * self.patch_size**2
        return tuple(base * scale**2 for scale in self.patch_scales)
