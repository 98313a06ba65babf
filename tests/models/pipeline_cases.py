"""The pipelines of diffusers, built from tiny random parts; and a loop like theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.patch_cases import NUM_TEXT, POOLED_WIDTH, TEXT_WIDTH, tiny_flux
from trinity.models.host_flux import FluxHost
from trinity.models.patch_sampler import FixedSplit

NUM_STEPS = 12
HALVES = FixedSplit(((4, 0.25), (2, 0.5)))
HALVES_SIZES = [4] * 3 + [2] * 6 + [1] * 3


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "dog"]
    table = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=table,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=8,
    )


def flux_pipe(transformer: nn.Module) -> Any:
    """FluxPipeline with random text encoders and decoder, at one pixel per latent."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=16,
        hidden_size=POOLED_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    t5 = T5Config(vocab_size=16, d_model=TEXT_WIDTH, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=3,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        CLIPTextModel(clip),
        tiny_tokenizer(),
        T5EncoderModel(t5),
        tiny_tokenizer(),
        transformer,
    )
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_pipe(transformer: nn.Module) -> Any:
    """WanPipeline with a random text encoder and decoder, at two pixels per latent."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    t5 = UMT5Config(vocab_size=16, d_model=TEXT_WIDTH, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=3,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 3,
        latents_std=[1.0] * 3,
        scale_factor_spatial=2,
        scale_factor_temporal=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tiny_tokenizer(), UMT5EncoderModel(t5), vae, scheduler, transformer)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class FluxLoop:
    """A sampling loop as the pipelines have it, around a transformer."""

    def __init__(
        self, transformer: Any, condition: Any, *, names: tuple[str, ...] = ("cond",)
    ) -> None:
        self.transformer, self.condition, self.names = transformer, condition, names

    def run(self, z: Tensor, num_steps: int = NUM_STEPS) -> list[Tensor]:
        """Packed latents of all steps, the first one included."""
        host = FluxHost(tiny_flux())
        tokens = host.write_sample(z)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(12.0))
        path = [tokens]
        for step in range(num_steps):
            sigma = 1 - step / num_steps
            for name in self.names:
                with self.transformer.cache_context(name):
                    velocity = self.transformer(
                        hidden_states=tokens,
                        timestep=torch.full((len(z),), sigma),
                        encoder_hidden_states=self.condition.prompt_BSD,
                        pooled_projections=self.condition.pooled_BD,
                        img_ids=ids,
                        txt_ids=torch.zeros(NUM_TEXT, 3),
                        return_dict=False,
                    )[0]
            tokens = tokens - velocity / num_steps
            path.append(tokens)
        return path
