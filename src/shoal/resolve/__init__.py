"""From presets, recipes and flags to one checked config."""
