"""Opening a trained model, wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from trinity.ckpt.hf import import_hf
from trinity.ckpt.store import latest_checkpoint, load_tensors
from trinity.core.errors import CheckpointError
from trinity.core.load_config import load_config, load_image_config
from trinity.core.run_files import CONFIG_FILE
from trinity.data.tokenizer import Tokenizer, load_tokenizer
from trinity.models.dit import DiffusionTransformer
from trinity.models.lm import LanguageModel
from trinity.models.staged import StagedModel

Model = TypeVar("Model", bound=StagedModel)
HF_CONFIG = "config.json"
MODEL_PREFIX, AVERAGE_PREFIX = "model.", "ema."
"""Of names in a run's checkpoint."""
RUN_TOKENIZER = "tokenizer"


def load(path: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """Load model and tokenizer from a run directory or a Hugging Face AFMoE directory.

    The model is on the CPU in fp32, in evaluation mode. Of a run, the newest checkpoint that
    verifies is taken. Raises CheckpointError or DataError naming what is missing or damaged.
    """
    path = Path(path)
    if (path / CONFIG_FILE).is_file():
        return load_run_model(path), load_tokenizer(path / RUN_TOKENIZER)
    if (path / HF_CONFIG).is_file():
        checkpoint = import_hf(path)
        model = LanguageModel.on_meta(checkpoint.model_config).to_empty(device="cpu")
        checkpoint.load_into(model)
        return model.eval(), load_tokenizer(path)
    raise CheckpointError(
        f"{path} is neither a run directory ({CONFIG_FILE}) nor a Hugging Face directory "
        f"({HF_CONFIG}); check the path"
    )


def load_run_model(run_dir: Path) -> LanguageModel:
    """The language model of a run at its newest good checkpoint."""
    model = LanguageModel.on_meta(load_config(run_dir / CONFIG_FILE).model)
    return _filled(model.to_empty(device="cpu"), usable_checkpoint(run_dir), MODEL_PREFIX)


def load_run_dit(
    run_dir: Path, *, average: bool, checkpoint: Path | None = None
) -> DiffusionTransformer:
    """The diffusion transformer of a run at its newest good checkpoint.

    ``average`` takes the averaged weights, if the run keeps any. With a ``checkpoint``, one that is
    known to be good, any rank of a job may call it alone.
    """
    config = load_image_config(run_dir / CONFIG_FILE)
    model = DiffusionTransformer.on_meta(config.model).to_empty(device="cpu")
    has_average = average and config.ema.decay > 0
    prefix = AVERAGE_PREFIX if has_average else MODEL_PREFIX
    return _filled(model, checkpoint or usable_checkpoint(run_dir), prefix)


def _filled(model: Model, checkpoint: Path, prefix: str) -> Model:
    names = [f"{prefix}{name}" for name in model.state_dict()]
    tensors = load_tensors(checkpoint, names)
    for name, tensor in model.state_dict().items():
        stored = tensors[f"{prefix}{name}"]
        if stored.shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint}: {name} has shape {tuple(stored.shape)} there but "
                f"{tuple(tensor.shape)} by {CONFIG_FILE}; restore the run's own {CONFIG_FILE}"
            )
        tensor.copy_(stored)
    return model.eval()


def usable_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run that verifies, or a CheckpointError with the reasons."""
    found, rejected = latest_checkpoint(run_dir)
    if found is None:
        reasons = "; ".join(rejected) or "none was saved yet"
        raise CheckpointError(f"{run_dir} holds no usable checkpoint: {reasons}")
    return found
