"""Text to token ids and back, with the exact boundary between prompt and response."""
