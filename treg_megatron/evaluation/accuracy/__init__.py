"""Preference accuracy of a policy, and its divergence from the reference, without a judge."""
