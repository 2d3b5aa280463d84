"""Profiles of training steps: the recording and what it says about operators, modules, memory and overlap."""
