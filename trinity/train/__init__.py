"""The training loop and everything only it needs."""
