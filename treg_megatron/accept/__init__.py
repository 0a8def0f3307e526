"""Acceptance of a machine: what only its GPUs can tell, in the first quarter of an hour on them.

Every check is a process of its own with a time limit, so that a crash or a hang of one hides nothing of the others.
"""
