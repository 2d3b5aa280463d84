"""The first cause of a failed run or job: which process failed first, and why, read from all its logs."""
