"""Processes, parallel layouts and the installed stack."""
