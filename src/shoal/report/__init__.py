"""Reports on a run or a config, made outside the training loop."""
