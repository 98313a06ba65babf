"""Import and export of Hugging Face ``AfmoeForCausalLM`` directories, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trinity.ckpt.hf_config import read_hf_config, write_hf_config
from trinity.ckpt.hf_names import Layout, Piece, num_pieces, pieces
from trinity.ckpt.manifest import is_plain_name, read_json, sync_directory, write_synced
from trinity.core.config import ModelConfig
from trinity.core.errors import CheckpointError
from trinity.data.tokenizer import load_tokenizer
from trinity.models.lm import LanguageModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Any other is quantized or not a weight, and would be wrong when merely cast.
WEIGHT_DTYPES = ("F32", "BF16", "F16")
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def hf_tensors(
    config: ModelConfig, tensor_of: Callable[[str], Tensor], layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """All tensors under their Hugging Face names; each of ours is asked for once, in turn.

    Raises CheckpointError when one has another shape than ``config`` says: experts beyond
    ``num_experts``, for instance, would be lost without a word.
    """
    shapes = _our_shapes(config)
    name, tensor = "", torch.empty(0)
    for piece in pieces(config, layout):
        if piece.our_name != name:
            tensor = torch.empty(0)  # let go of the last one before the next is made
            name, tensor = piece.our_name, tensor_of(piece.our_name)
            if tensor.shape != shapes[name]:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)}, not {tuple(shapes[name])} as the "
                    "configuration says; use the one the weights were saved with"
                )
        yield piece.hf_name, _to_disk(piece, tensor)


def hf_state_dict(model: LanguageModel, *, gradients: bool = False) -> dict[str, Tensor]:
    """The model, or its gradients, under the names that transformers has in memory.

    The tensors share the model's memory.
    """
    ours: dict[str, Tensor] = dict(model.state_dict())
    if gradients:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        ours = zeros | found
    return dict(hf_tensors(model.config, ours.__getitem__, "fused"))


def export_hf(
    config: ModelConfig,
    tensor_of: Callable[[str], Tensor],
    directory: Path,
    *,
    tokenizer_dir: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
    layout: Layout = "per_expert",
) -> None:
    """Write a directory that transformers loads without a missing or unexpected key.

    Args:
        tensor_of: gives one of our tensors by name; asked for each once.
        tokenizer_dir: its tokenizer is copied; None leaves the directory without one.
        dtype: of the weights; None keeps what ``tensor_of`` gives. The expert bias is always fp32.
        max_shard_bytes: at most this much is held in memory at a time, besides one of our tensors.

    Written aside, forced to disk and renamed: a directory that exists is complete. Raises
    CheckpointError when it exists already or cannot be written.
    """
    if directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} exists and is not empty; choose another directory")
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        writer = _ShardWriter(temporary, max_shard_bytes)
        for name, tensor in hf_tensors(config, tensor_of, layout):
            is_bias = name.endswith("expert_bias")
            writer.add(name, tensor.to(torch.float32 if is_bias else dtype or tensor.dtype))
            del tensor  # a view that would keep all experts of its layer
        weights_dtype = writer.finish()
        bos = eos = None
        if tokenizer_dir is not None:
            bos, eos = _copy_tokenizer(tokenizer_dir, temporary, config.vocab_size)
        write_hf_config(
            temporary, config, dtype=DTYPE_NAMES.get(weights_dtype, "float32"), bos=bos, eos=eos
        )
        sync_directory(temporary)
        if directory.exists():
            directory.rmdir()
        os.rename(temporary, directory)
        sync_directory(directory.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {directory}: {error}; free space there, or mend its permissions, and "
            "export again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class HFCheckpoint:
    """A Hugging Face AFMoE directory, checked when opened, read tensor by tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model_config = read_hf_config(directory)
        self._files = _weight_files(directory)
        self._handles: dict[str, Any] = {}
        fused = any(name.endswith("mlp.experts.gate_up_proj") for name in self._files)
        self.layout: Layout = "fused" if fused else "per_expert"
        self._pieces = self._checked_pieces()

    def tensor(self, name: str) -> Tensor:
        """One tensor under our name, in the dtype it has on disk."""
        found = self._pieces.get(name)
        if found is None:
            raise CheckpointError(f"{self.directory} holds nothing for {name}")
        if len(found) == 1 and found[0].expert is None:
            tensor = self._read(found[0].hf_name)
            return tensor.unflatten(1, (2, -1)) if found[0].is_fused else tensor
        first = self._read(found[0].hf_name)
        wanted = self._slice(found[0].hf_name).get_dtype()
        for piece in found:  # copied into one stack, another dtype would be cast in silence
            if (dtype := self._slice(piece.hf_name).get_dtype()) != wanted:
                raise CheckpointError(
                    f"{self.directory}: {piece.hf_name} is {dtype}, but {found[0].hf_name} is "
                    f"{wanted}; experts of a layer must agree"
                )
        halves = () if found[0].half is None else (2,)
        stack = first.new_empty(self.model_config.num_experts, *halves, *first.shape)
        for piece in found:
            target = stack[piece.expert] if piece.half is None else stack[piece.expert, piece.half]
            target.copy_(self._read(piece.hf_name))
        return stack

    def iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors under our names, one in memory at a time, in the order of the layers."""
        for name in self._pieces:
            yield name, self.tensor(name)

    def load_into(self, model: nn.Module) -> None:
        """Fill ``model`` in place; the momentum of the balancing bias starts at zero.

        ``model`` has our names and real memory. Raises CheckpointError, before anything is
        written, unless its names and shapes are exactly those of the checkpoint.
        """
        state = model.state_dict()
        momenta = {name for name in state if name.endswith("bias_momentum")}
        if missing := sorted(state.keys() - momenta - self._pieces.keys()):
            raise CheckpointError(f"{self.directory} holds nothing for {missing[0]}")
        if unexpected := sorted(self._pieces.keys() - state.keys()):
            raise CheckpointError(f"{self.directory}: the model has no {unexpected[0]}")
        shapes = _our_shapes(self.model_config)
        for name, tensor in state.items():
            assert not tensor.is_meta, f"{name} has no memory to load into"
            if tensor.shape != shapes[name]:
                raise CheckpointError(
                    f"{self.directory}: {name} is {tuple(shapes[name])}, the model wants "
                    f"{tuple(tensor.shape)}; build it from this directory's config.json"
                )
        with torch.no_grad():
            for name in momenta:
                state[name].zero_()
            for name, tensor in self.iter_tensors():
                state[name].copy_(tensor)

    def _checked_pieces(self) -> dict[str, list[Piece]]:
        """Group the files' tensors by our names; every name and shape must be the expected one."""
        names = {n for n in self._files if not n.endswith("rotary_emb.inv_freq")}
        expected = num_pieces(self.model_config, self.layout)
        if expected > 2 * len(names) + 1000:
            raise CheckpointError(
                f"{self.directory}: config.json describes {expected} tensors, the files hold "
                f"{len(names)}; they do not belong together"
            )
        shapes = _our_shapes(self.model_config)
        grouped: dict[str, list[Piece]] = {}
        for piece in pieces(self.model_config, self.layout):
            if piece.hf_name not in names:
                raise CheckpointError(f"{self.directory}: tensor {piece.hf_name} is missing")
            names.discard(piece.hf_name)
            wanted = _disk_shape(piece, shapes[piece.our_name])
            found = tuple(self._slice(piece.hf_name).get_shape())
            if found != wanted:
                raise CheckpointError(
                    f"{self.directory}: {piece.hf_name} has shape {found}, not {wanted} as "
                    "config.json says"
                )
            if (dtype := self._slice(piece.hf_name).get_dtype()) not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{self.directory}: {piece.hf_name} is {dtype}; only {', '.join(WEIGHT_DTYPES)}"
                    " weights are read, dequantize it first"
                )
            grouped.setdefault(piece.our_name, []).append(piece)
        if names:
            raise CheckpointError(f"{self.directory}: tensor {min(names)} is unexpected")
        return grouped

    def _read(self, hf_name: str) -> Tensor:
        try:
            return self._slice(hf_name)[:]
        except SafetensorError as error:
            raise CheckpointError(f"{self.directory}: {hf_name} is not readable: {error}") from None

    def _slice(self, hf_name: str) -> Any:
        file = self._files[hf_name]
        if file not in self._handles:
            self._handles[file] = _open(self.directory / file)
        return self._handles[file].get_slice(hf_name)


def import_hf(directory: Path) -> HFCheckpoint:
    """Open a Hugging Face AFMoE directory, either layout, one file or many.

    Raises CheckpointError for a damaged, incomplete or hostile directory. Only safetensors are
    read, only from plain files inside the directory, and no code of it runs.
    """
    return HFCheckpoint(Path(directory))


def _our_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    try:
        return {name: t.shape for name, t in LanguageModel.on_meta(config).state_dict().items()}
    except RuntimeError as error:  # sizes that overflow even without memory
        raise CheckpointError(f"no model has the sizes of this configuration: {error}") from None


def _to_disk(piece: Piece, tensor: Tensor) -> Tensor:
    if piece.is_fused:
        return tensor.flatten(1, 2)
    if piece.expert is None:
        return tensor
    return tensor[piece.expert] if piece.half is None else tensor[piece.expert, piece.half]


def _disk_shape(piece: Piece, ours: torch.Size) -> tuple[int, ...]:
    if piece.is_fused:
        return (ours[0], ours[1] * ours[2], ours[3])
    leading = (piece.expert is not None) + (piece.half is not None)
    return tuple(ours[leading:])


class _ShardWriter:
    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._written: list[list[str]] = []
        self._total_bytes = 0
        self._dtype = torch.float32

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._max_bytes:
            self._flush()
        if not name.endswith("expert_bias"):
            self._dtype = tensor.dtype
        # A copy of its own: slices of a stack would drag the whole stack along.
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._held_bytes += size
        self._total_bytes += size

    def finish(self) -> torch.dtype:
        self._flush()
        count = len(self._written)
        weight_map = {}
        for i, names in enumerate(self._written):
            final = SINGLE_FILE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._directory / f"part-{i}", self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            write_synced(self._directory / INDEX_FILE, text)
        return self._dtype

    def _flush(self) -> None:
        path = self._directory / f"part-{len(self._written)}"
        save_file(self._held, path, metadata={"format": "pt"})
        _sync_file(path)
        self._written.append(list(self._held))
        self._held, self._held_bytes = {}, 0


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _copy_tokenizer(source: Path, target: Path, vocab_size: int) -> tuple[int, int]:
    """Copy the tokenizer's files; returns its begin and end ids."""
    for name in TOKENIZER_FILES:
        if (source / name).is_symlink():
            _refuse_outside(source / name)
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer in {source} has {tokenizer.vocab_size} entries, the model only "
            f"{vocab_size}; export the one it was trained with"
        )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            _sync_file(target / name)
    return tokenizer.bos_id, tokenizer.eos_id


def _weight_files(directory: Path) -> dict[str, str]:
    """Which file holds each tensor. Files must be plain ones, directly inside ``directory``."""
    index = directory / INDEX_FILE
    if index.is_file():
        return _indexed_files(index)
    if (directory / SINGLE_FILE).exists():
        return dict.fromkeys(_open(directory / SINGLE_FILE).keys(), SINGLE_FILE)
    pickles = sorted(p.name for p in directory.glob("*.bin"))
    hint = f"; {pickles[0]} is a pickle, which is not read" if pickles else ""
    raise CheckpointError(f"{directory} holds neither {INDEX_FILE} nor {SINGLE_FILE}{hint}")


def _indexed_files(index: Path) -> dict[str, str]:
    """The index's map from tensor to file, once it agrees with what the files hold."""
    _refuse_outside(index)
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{index} is not a readable index: it has no weight_map")
    for tensor, file in entries.items():
        if not is_plain_name(file):
            raise CheckpointError(
                f"{index}: {tensor} points to {file!r}; only plain file names inside the "
                "directory are read"
            )
    for file in sorted(set(entries.values())):
        path = index.parent / file
        held, named = set(_open(path).keys()), {t for t, f in entries.items() if f == file}
        if absent := sorted(named - held):
            raise CheckpointError(f"{path} lacks {absent[0]}, which the index names")
        if hidden := sorted(held - named):
            raise CheckpointError(f"{path} holds {hidden[0]}, which the index does not name")
    return entries


def _refuse_outside(path: Path) -> None:
    """Links may not lead out: what is converted gets published, and must not carry other files."""
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise CheckpointError(
            f"{path} is a link that leads out of its directory; copy it with its links followed "
            "(cp -rL) and open the copy"
        )


def _open(path: Path) -> Any:
    _refuse_outside(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch the directory again")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
