"""What a run says of itself: timers, rates, the console, and `metrics.jsonl`, which is the truth."""
