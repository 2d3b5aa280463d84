"""shoal trains language models from scratch, on whatever you have. See `shoal --help` and docs/API.md."""

__version__ = "0.1.0"
