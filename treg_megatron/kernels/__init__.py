"""Building blocks of a transformer layer in torch."""
