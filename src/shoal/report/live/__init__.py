"""The live view of runs, `shoal top`: made from a run's files alone, so it works from any terminal that sees them."""
