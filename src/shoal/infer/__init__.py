"""What a trained model is for: loss on a text, and text."""
