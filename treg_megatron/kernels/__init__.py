"""Kernels of a transformer block: a reference set in plain torch, and a fast set for CPUs."""
