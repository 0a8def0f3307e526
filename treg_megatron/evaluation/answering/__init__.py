"""A model's answers to the prompts of a benchmark: the step ``answers``."""
