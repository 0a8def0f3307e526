"""Components of a training job: data module, strategy, trainer and callbacks."""
