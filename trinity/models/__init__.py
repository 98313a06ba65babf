"""Whole models built from the backbone, and generation."""
