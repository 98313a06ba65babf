"""FP8 products for the linears of the blocks, through torchao."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Literal

from torch import nn

from trinity.core.errors import ConfigError
from trinity.core.runtime import has_fp8
from trinity.models.staged import StagedModel

Fp8Recipe = Literal["off", "tensorwise", "rowwise"]
FP8_CLASS = "Float8Linear"
"""What torchao turns a linear into, a subclass of it with the same parameters."""
FP8_MULTIPLE = 16
"""Both sides of a product must be a multiple of this for the FP8 units of a GPU."""


def use_fp8(model: StagedModel, recipe: Fp8Recipe) -> None:
    """Turn the linears inside the blocks into ones that multiply in FP8, by name as before.

    Operands are scaled, per tensor or per row, and rounded when they are used; parameters stay as
    they are. Router, experts, norms, embedding and head keep their precision. Where there are no
    FP8 units, the rounding is emulated, slowly, so that its effect can be studied anywhere.

    Raises ConfigError when torchao is not installed.
    """
    if recipe == "off":
        return
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f'train.fp8="{recipe}" needs torchao ({error}); pip install "trinity-pretrain[fp8]", '
            'or set train.fp8="off"'
        ) from None
    config = Float8LinearConfig.from_recipe_name(recipe)
    if not has_fp8():
        config = dataclasses.replace(config, emulate=True)
    convert_to_float8_training(model.backbone.layers, config=config, module_filter_fn=_is_suited)


def leave_fp8(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Take linears whose name matches a pattern out of FP8 again; returns their names.

    In place, parameters and all: whoever holds the module, FSDP for one, need not know.
    """
    left = []
    for name, module in model.named_modules():
        is_fp8 = isinstance(module, nn.Linear) and type(module).__name__ == FP8_CLASS
        if is_fp8 and any(fnmatch.fnmatchcase(name, f"*{pattern}") for pattern in patterns):
            module.__class__ = nn.Linear
            left.append(name)
    return left


def _is_suited(module: nn.Module, _name: str) -> bool:
    return (
        isinstance(module, nn.Linear)
        and module.in_features % FP8_MULTIPLE == 0
        and module.out_features % FP8_MULTIPLE == 0
    )
