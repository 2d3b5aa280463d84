"""Starting, watching and restarting workers on one or several nodes."""
