"""Token rewards and reference log-probs by contrastive prompting."""
