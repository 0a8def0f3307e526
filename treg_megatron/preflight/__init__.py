"""Dry run of a recipe on a cluster: real models on meta tensors in a fake process group, without a GPU."""
