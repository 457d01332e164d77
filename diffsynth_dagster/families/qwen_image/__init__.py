"""Qwen-Image and its editing releases."""
