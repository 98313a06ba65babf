"""Pretraining of hybrid mixture-of-experts models, from one CPU to many nodes.

model, tokenizer = trinity.load("runs/tiny-...")   # or a Hugging Face directory
logits_BSV = model(tokens_BS)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from trinity.ckpt.load import load


def __getattr__(name: str) -> object:
    # Importing trinity must stay cheap: torch is loaded with the first use of `load`.
    if name == "load":
        from trinity.ckpt.load import load

        return load
    raise AttributeError(f"module 'trinity' has no attribute {name!r}")
