"""Documents, from wherever they lie."""
