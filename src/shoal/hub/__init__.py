"""Folders of weights in Hugging Face's layout: finding, fetching, opening them, and reading their shape. No torch."""
