"""Files, progress, logging and the command boundary: nothing here knows about models."""
