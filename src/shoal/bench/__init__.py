"""Benchmarks of the training step, the check of a parallel layout (`shoal verify`), and a description of the machine."""
