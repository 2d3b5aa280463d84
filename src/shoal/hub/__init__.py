"""Folders of weights as Hugging Face lays them out: where they are, what is in them, what shape they say. No torch."""
