"""The doctor: what is wrong with which node, before a run finds out."""
