"""Qwen-Image: text to image, and its editing releases."""
