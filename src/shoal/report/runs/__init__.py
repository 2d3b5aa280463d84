"""What one or several runs are and did: facts, differences, cost."""
