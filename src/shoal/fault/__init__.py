"""What to do when something outside asks a run to stop, or its numbers go wrong."""
