"""Stable Diffusion XL: text to image, with or without a ControlNet."""
