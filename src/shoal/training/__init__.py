"""The main job: `loop.py` tells it in order, `step.py` is one optimizer step."""
