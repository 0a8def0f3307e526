"""What a training job is made of."""
