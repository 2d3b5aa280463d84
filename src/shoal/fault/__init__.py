"""Time limits, stragglers, the origin of NaN and Inf, and planned faults for tests."""
