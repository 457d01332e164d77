"""The loop, trainable modules, validation and reporting."""
