"""The loop, trainable modules, validation, and states to go on from."""
