"""Checkpoints: the crash-safe store of a run, and the Hugging Face bridge."""
