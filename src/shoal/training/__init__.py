"""Training: `loop.py` is the training loop, `run.py` the parts of a run, `step.py` one optimizer step."""
