"""Curves from a run's log, reduced so that no point is hidden, and their cache. No torch."""
