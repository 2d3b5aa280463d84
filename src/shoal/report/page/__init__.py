"""The page of runs: one HTML file that a report embeds its data in, and that the dashboard serves."""
