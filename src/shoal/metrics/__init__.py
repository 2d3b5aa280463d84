"""Timers, rates and facts of the device: the numbers that a run reports."""
