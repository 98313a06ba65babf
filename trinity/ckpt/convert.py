"""``trinity convert``: a Hugging Face directory from whatever holds a model, one file at a time."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from trinity.ckpt.hf import export_hf, import_hf
from trinity.ckpt.hf_config import check_is_afmoe
from trinity.ckpt.hf_names import Layout
from trinity.ckpt.load import HF_CONFIG, RUN_TOKENIZER, usable_checkpoint
from trinity.ckpt.store import load_tensors
from trinity.core.errors import CheckpointError, ConfigError
from trinity.core.load_config import load_config
from trinity.core.run_files import CONFIG_FILE

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def convert_to_hf(
    source: Path, target: Path, *, dtype: str, max_shard_bytes: int, layout: str = "per_expert"
) -> None:
    """Write ``target`` as an ``AfmoeForCausalLM`` directory.

    ``source`` is a run directory, of which the newest checkpoint that verifies is taken, or a
    Hugging Face directory in either layout of the experts. Tensors are read when they are written,
    so memory stays near ``max_shard_bytes``.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if layout not in get_args(Layout):
        raise ConfigError(f"--layout {layout!r} is unknown; use {' or '.join(get_args(Layout))}")
    if (source / CONFIG_FILE).is_file():
        config = load_config(source / CONFIG_FILE).model
        check_is_afmoe(config)
        checkpoint = usable_checkpoint(source)

        def tensor_of(name: str) -> Tensor:
            key = f"model.{name}"
            return load_tensors(checkpoint, [key])[key]

        tokenizer_dir = source / RUN_TOKENIZER
    elif (source / HF_CONFIG).is_file():
        hf = import_hf(source)
        config, tensor_of, tokenizer_dir = hf.model_config, hf.tensor, source
    else:
        raise CheckpointError(
            f"{source} is neither a run directory ({CONFIG_FILE}) nor a Hugging Face directory "
            f"({HF_CONFIG}); check the path"
        )
    export_hf(
        config,
        tensor_of,
        target,
        tokenizer_dir=tokenizer_dir,
        max_shard_bytes=max_shard_bytes,
        dtype=DTYPES[dtype],
        layout=cast(Layout, layout),
    )
