"""Launchers: how the worker processes of a run are started."""
