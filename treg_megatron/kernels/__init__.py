"""What a transformer block computes with: a plain torch set, and a fast one for CPUs."""
