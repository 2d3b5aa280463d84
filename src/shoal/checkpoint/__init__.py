"""What survives a run: sharded safetensors and JSON, complete or not there."""
