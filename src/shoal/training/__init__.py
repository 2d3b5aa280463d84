"""Training: `loop.py` tells the story, `run.py` has what a run holds, `step.py` is one optimizer step."""
