"""Win rates of arms against a baseline, and of arms against each other on the same prompts."""
