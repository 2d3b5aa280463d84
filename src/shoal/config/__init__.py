"""What a user can ask for, and what follows from it alone."""
