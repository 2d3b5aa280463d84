"""Documents that are removed before anything else reads the corpus."""
