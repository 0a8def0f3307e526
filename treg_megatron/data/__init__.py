"""Preference pairs, labelled pairs and aligned indexed datasets."""
