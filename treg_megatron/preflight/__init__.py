"""Whether a recipe would run on a cluster, found out on a laptop: real models on meta tensors, in a fake world."""
