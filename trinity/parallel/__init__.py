"""Parallelism and recomputation, applied to a model from outside."""
