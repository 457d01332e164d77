"""FLUX.1: text to image, with reference images (Kontext) or a ControlNet."""
