"""Model files: find them, tell what they are, build and load the modules."""
