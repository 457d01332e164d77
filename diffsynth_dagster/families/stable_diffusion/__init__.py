"""Stable Diffusion 1.5, with or without a ControlNet."""
