"""Tensor functions: a plain PyTorch reference beside every fast path, chosen by name."""
