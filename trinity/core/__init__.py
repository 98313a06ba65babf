"""Shared foundations: configuration, errors, shape legend, runtime. Imports nothing of trinity."""
