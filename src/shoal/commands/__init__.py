"""The verbs of the command line: their options, and the code that runs them."""
