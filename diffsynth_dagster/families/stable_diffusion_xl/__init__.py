"""Stable Diffusion XL, with or without a ControlNet."""
