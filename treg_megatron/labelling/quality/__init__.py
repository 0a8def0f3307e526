"""Quality of token rewards, in figures and curves, before anything is trained on them."""
