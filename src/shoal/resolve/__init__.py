"""Presets, recipes and flags, resolved to one checked config."""
