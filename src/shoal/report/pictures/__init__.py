"""Pictures of runs, as PNG and SVG, drawn with matplotlib. No torch."""
