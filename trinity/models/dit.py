"""The diffusion transformer: the language model's backbone between patches and velocities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trinity.core.dit_config import DiTConfig
from trinity.models.backbone import Backbone, BackboneOutput
from trinity.models.first_block_cache import Reuse
from trinity.models.patching import patch_centres, patchify, unpatchify
from trinity.models.staged import LossSums, StagedModel
from trinity.nn.modulation import Conditioning, modulate
from trinity.nn.patch_ends import (
    NUM_VECTORS,
    ImageCondition,
    ImageVectors,
    PatchEmbed,
    PatchHead,
)
from trinity.nn.rope import image_rope_tables
from trinity.ops.image_attention import Sight


class DiffusionTransformer(StagedModel):
    """Predicts the velocity of rectified flow at noisy images or latents, patch by patch.

    Blocks are those of :class:`trinity.models.lm.LanguageModel`, under the same names: what is new
    is each block's ``adaln`` table, the routers' ``time_weight`` and the mixers' ``reverse``
    direction, all zero at first. Attention and scans see the whole image. Patches of all sizes
    stand at their centres, so that positions agree.
    """

    FIRST = ("patch_embed", "condition")
    LAST = ("patch_head",)
    loss_is_whole = False
    config: DiTConfig
    patch_embed: PatchEmbed | None
    condition: ImageCondition | None
    patch_head: PatchHead | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.patch_embed = PatchEmbed(config)
        self.condition = ImageCondition(config)
        self.backbone = Backbone(config)
        self.patch_head = PatchHead(config)

    def forward(
        self,
        z: Tensor,
        sigma: Tensor | float,
        condition: Tensor,
        *,
        scale: int = 1,
        edge: int | None = None,
        spacing: int | None = None,
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Velocities of latents (B, C, H, W) or (B, C, T, H, W), in their dtype.

        Args:
            z: the latents.
            sigma: noise level, one for all or one per row.
            condition: classes (B,), ``num_classes`` for none; or embeddings (B, W), zero for none.
            scale: patches of so many base patches a side, one of ``config.patch_scales``.
            edge: of a patch in pixels, for who has put projections of other patches in the place of
                the model's.
            spacing: base tokens from one patch to the next, where it is not ``scale``.
            reuse: what a :class:`FirstBlockCache` gives for these rows; None computes all blocks.

        Raises ConfigError when the latents are not a whole number of such patches.
        """
        assert self.patch_head is not None
        config = self.config
        size, frames = edge or config.patch_size * scale, config.patch_frames
        patches_BSP = patchify(z, size, frames=frames)
        sigma_B = torch.as_tensor(sigma, dtype=torch.float32, device=z.device).expand(len(z))
        shape = patches_BSP.shape[:2]
        given = {
            "scale_BS": torch.full(shape, config.patch_scales.index(scale), device=z.device),
            "coordinates_BSA": self._grid_of(z, size, spacing or scale),
            "document_ids_BS": torch.zeros(shape, dtype=torch.int32, device=z.device),
            "sigma_BN": sigma_B.unsqueeze(1),
            "condition": condition.unsqueeze(1),
        }
        x_BSD = self.enter(patches_BSP, given)
        hidden_BSD = self.before_head(self.run_blocks(x_BSD, given, reuse), given)
        out_BSP = self.patch_head(hidden_BSD, given["scale_BS"])[..., : patches_BSP.shape[-1]]
        return unpatchify(out_BSP.to(z.dtype), tuple(z.shape[2:]), size, frames=frames)

    def _grid_of(self, z: Tensor, edge: int, spacing: int) -> Tensor:
        """Where the patches of one image stand, (1, S, A)."""
        grid = (z.shape[-2] // edge, z.shape[-1] // edge)
        if self.config.num_axes == 3:
            frames = z.shape[2] if z.ndim == 5 else 1
            grid = (frames // self.config.patch_frames, *grid)
        return patch_centres(grid, spacing).to(z.device).unsqueeze(0)

    def enter(self, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Tokens of the patches, then what the images' conditions come to."""
        assert self.patch_embed is not None
        assert self.condition is not None
        x_BSD = self.patch_embed(x, given["scale_BS"])
        if torch.is_autocast_enabled(x_BSD.device.type):
            x_BSD = x_BSD.to(torch.get_autocast_dtype(x_BSD.device.type))
        vectors = self.condition(given["sigma_BN"], given["condition"])
        return torch.cat((x_BSD, vectors.flatten(1, 2).to(x_BSD.dtype)), dim=1)

    def num_extra_positions(self, num_images: int) -> int:
        """Those that carry the vectors of the images."""
        return num_images * NUM_VECTORS

    def run_blocks(
        self, x_BSD: Tensor, given: Mapping[str, Tensor], reuse: Reuse | None = None
    ) -> BackboneOutput:
        """The stream after the blocks that are here, the vectors of the images behind it."""
        config = self.config
        sigma_BN, ids_BS = given["sigma_BN"], given["document_ids_BS"]
        num_images = sigma_BN.shape[1]
        num_vectors = num_images * NUM_VECTORS
        x_BSD, behind_BSD = x_BSD.tensor_split([x_BSD.shape[1] - num_vectors], dim=1)
        vectors = ImageVectors.from_positions(behind_BSD)
        own, num_own = self.backbone.row_part.own, x_BSD.shape[1]
        image_BS = self._image_of_tokens(given, num_own)
        coordinates_BSA = given["coordinates_BSA"]
        # The tokens between two matrices may be fewer than those of a mixer, which sees the rows of
        # all ranks that share it.
        in_mixer = num_own * self.backbone.row_part.stream_split
        first = self.backbone.row_part.index * in_mixer
        documents_BS = ids_BS if num_images > 1 else None
        rope = image_rope_tables(
            coordinates_BSA[:, first : first + in_mixer], config.head_dim, config.rope_theta
        )
        bucket_BN = (sigma_BN * config.load_buckets).long().clamp(0, config.load_buckets - 1)
        bucket_BS = _of_images(bucket_BN, image_BS)
        if num_images > 1:
            bucket_BS = bucket_BS.where(own(ids_BS, num_own) < num_images, -1)
        conditioning = Conditioning(
            modulation_BSMD=_of_images(vectors.modulation_BNMD, image_BS),
            time_BSD=_of_images(vectors.time_BND, image_BS),
            bucket_BS=bucket_BS,
            sight=Sight(coordinates_BSA, documents_BS, first_query=first, num_queries=in_mixer),
        )
        if reuse is None:
            out = self.backbone.run(x_BSD, rope, documents_BS, conditioning=conditioning)
        else:
            out = self.backbone.run_reusing(x_BSD, rope, conditioning, reuse)
        return out._replace(hidden_BSD=torch.cat((out.hidden_BSD, behind_BSD), dim=1))

    def _image_of_tokens(self, given: Mapping[str, Tensor], num_own: int) -> Tensor | None:
        """Which image of its row each token here belongs to; None where there is only one."""
        num_images = given["sigma_BN"].shape[1]
        if num_images == 1:
            return None
        ids_BS = self.backbone.row_part.own(given["document_ids_BS"], num_own)
        return ids_BS.long().clamp(max=num_images - 1)

    def before_head(self, out: BackboneOutput, given: Mapping[str, Tensor]) -> Tensor:
        """What the head is given: the normed stream, shifted and scaled."""
        num_vectors = self.num_extra_positions(given["sigma_BN"].shape[1])
        x_BSD, behind_BSD = out.hidden_BSD.tensor_split(
            [out.hidden_BSD.shape[1] - num_vectors], dim=1
        )
        image_BS = self._image_of_tokens(given, x_BSD.shape[1])
        final_BSMD = _of_images(ImageVectors.from_positions(behind_BSD).final_BNMD, image_BS)
        return modulate(x_BSD, *final_BSMD.unbind(-2))

    def objective(self, out: BackboneOutput, given: Mapping[str, Tensor], config: Any) -> LossSums:
        """Squared error of the velocity: a mean over each image's elements, summed over images."""
        assert self.patch_head is not None
        sums = self.patch_head(
            self.before_head(out, given),
            given["scale_BS"],
            given["targets_BSP"],
            given["share_BS"],
            given["weight_BS"],
        )
        zero = sums.error.new_zeros(())
        return LossSums(sums.total, sums.error, zero, out.balance_loss, out.load_LE)


def _of_images(values_BN: Tensor, image_BS: Tensor | None) -> Tensor:
    """What belongs to each token's image, (B, S, ...) of (B, N, ...); (B, 1, ...) without images to
    tell apart."""
    if image_BS is None:
        return values_BN
    index = image_BS.reshape(*image_BS.shape, *[1] * (values_BN.ndim - 2))
    return values_BN.gather(1, index.expand(*image_BS.shape, *values_BN.shape[2:]))
