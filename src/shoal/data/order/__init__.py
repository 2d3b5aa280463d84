"""Which row is trained on when, what replaces one that cannot be read, and the record of it."""
