"""Reading profiles: a table for the console and a view for the page."""
