"""Inspect a weight file: where it comes from, how it differs from another, and how to make it
again."""
