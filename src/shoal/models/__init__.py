"""Model families as single-device code: nothing here knows of other ranks."""
