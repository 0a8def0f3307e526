"""Lightning callbacks of a training job."""
