"""Optimizers, the table that assigns parameters to them, and learning-rate schedules."""
