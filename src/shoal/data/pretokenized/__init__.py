"""Token files that other trainers made, read in place."""
