"""A run → a folder that loads anywhere, checked against the run."""
