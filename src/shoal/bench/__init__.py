"""Benchmarks of the training step, the certificate of a layout, and a description of the machine."""
