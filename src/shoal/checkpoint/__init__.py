"""Checkpoints: sharded safetensors and JSON files, written atomically."""
