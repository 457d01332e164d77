"""Stable Diffusion 1.5: text to image, with or without a ControlNet."""
