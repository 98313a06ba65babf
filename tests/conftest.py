"""Settings every test shares: offline, deterministic, one thread."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

# Bit-exact comparisons hold at equal thread counts only.
torch.set_num_threads(1)

TINY_RUN = """
name = "test"
seed = 7
output_dir = "{out}"

[model]
vocab_size = 512
hidden_size = 32
num_hidden_layers = 4
num_dense_layers = 1
intermediate_size = 48
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
route_scale = 1.5
sliding_window = 16
global_attn_every_n_layers = 2
max_position_embeddings = 512

[optim.muon]
lr = 1e-2

[optim.adamw]
lr = 3e-3

[schedule]
warmup_steps = 2
decay_steps = 4

[batch]
sequence_length = 64
rows_per_step = 4
microbatch_rows = 2

[data]
cache_dir = "{cache}"
buffer_documents = 8
lanes = 2
held_out_fraction = 0.1
tokenizer = {{ vocab_size = 400 }}
sources = [{{ name = "fixture", path = "{text}", format = "jsonl" }}]

[train]
num_steps = 12
precision = "fp32"
num_threads = 1
validate_every_steps = 5
validation_rows = 4

[checkpoint]
every_steps = 4
"""

TINY_IMAGE_RUN = """
name = "images"
seed = 7
output_dir = "{out}"

[model]
channels = 1
patch_size = 2
patch_scales = [1, 2]
num_classes = 10
time_width = 16
hidden_size = 32
layer_pattern = "W-SE*E"
intermediate_size = 48
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
route_scale = 1.5
sliding_window = 3
linear = {{ head_dim = 16 }}

[images]
cache_dir = "{cache}"
height = 8
width = 8
lanes = 2
held_out_fraction = 0.1
coarse_shares = [1.0, 2.0]
sources = [{{ name = "digits", format = "digits" }}]

[flow]
coarse_shift = 2.0

[samples]
num_steps = 8
guidance = 2.0
rows = 1

[ema]
decay = 0.9

[optim.muon]
lr = 1e-2

[optim.adamw]
lr = 3e-3

[schedule]
warmup_steps = 2
decay_steps = 4

# Images of 16 tokens or of 4, and two tokens that nothing fills.
[batch]
sequence_length = 42
rows_per_step = 4
microbatch_rows = 2

[train]
num_steps = 12
precision = "fp32"
num_threads = 1
validate_every_steps = 5
validation_rows = 4

[checkpoint]
every_steps = 4
"""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token-shard cache for the whole session: shards are built once."""
    return tmp_path_factory.mktemp("data-cache")


@pytest.fixture
def tiny_toml(tmp_path: Path, data_cache: Path, repository: Path) -> Path:
    """A configuration that trains on the text fixed in the repository within a second or two."""
    text = repository / "tests/data/fixtures/corpus.jsonl"
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_RUN.format(out=tmp_path / "runs", cache=data_cache, text=text))
    return path


@pytest.fixture
def tiny_images_toml(tmp_path: Path, data_cache: Path) -> Path:
    """A configuration that trains a diffusion transformer on digits within a second or two."""
    return _images_toml(tmp_path, data_cache)


@pytest.fixture(scope="session")
def images_run(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    """A finished run of :func:`tiny_images_toml`, with checkpoints at steps 8 and 12. To look at
    and to copy: nobody may change it."""
    from trinity.train.command import pretrain_command

    root = tmp_path_factory.mktemp("images")
    assert pretrain_command([str(_images_toml(root, data_cache))], root / "run", None) == 0
    return root / "run"


def _images_toml(root: Path, data_cache: Path) -> Path:
    path = root / "tiny-images.toml"
    path.write_text(TINY_IMAGE_RUN.format(out=root / "runs", cache=data_cache))
    return path
