"""Files, progress, logging and the boundary of every command, all independent of models."""
