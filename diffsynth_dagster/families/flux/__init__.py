"""FLUX.1, with reference images or a ControlNet."""
