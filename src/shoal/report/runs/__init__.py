"""What a run is and was: its facts, its configs, its cost. No torch."""
