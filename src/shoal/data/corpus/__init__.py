"""Documents from files, or generated."""
