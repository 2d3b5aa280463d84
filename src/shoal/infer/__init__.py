"""Using a trained model: scoring text, generating text, and exporting."""
