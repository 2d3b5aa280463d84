"""Workers started, watched and started again."""
