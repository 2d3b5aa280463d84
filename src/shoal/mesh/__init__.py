"""Where a process stands, and how it speaks to the others."""
