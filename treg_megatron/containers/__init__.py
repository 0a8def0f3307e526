"""Records of files, folders and hub datasets, as JSON-like values."""
