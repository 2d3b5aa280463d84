"""Copies of a run's records to trackers, sent by a process beside the first rank."""
