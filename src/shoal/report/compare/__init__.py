"""Whether runs differ beyond noise, from which step, and in which tensor."""
