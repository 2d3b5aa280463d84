"""Measuring: speed here and now, side by side with others."""
