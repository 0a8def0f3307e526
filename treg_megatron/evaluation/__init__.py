"""Whether alignment helped: answers to benchmark prompts, judgments of them, and what papers report."""
