"""Pictures of a run, made from its log, never inside the loop."""
