"""Parallel training of single-device models: sharding, gradient reduction, and the order in which they are applied."""
