"""What a run costs, before it runs. Never imports torch."""
