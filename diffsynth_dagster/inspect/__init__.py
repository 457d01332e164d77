"""Inspect a weight file: where it comes from, how two files differ, how to make one again."""
