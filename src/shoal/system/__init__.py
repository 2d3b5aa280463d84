"""Services of the machine for all packages: disk, terminal, network, processor, signals. Only `torch_private.py` imports torch."""
