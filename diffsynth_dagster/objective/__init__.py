"""Sigma schedules, the noising path, randomness and losses: pure functions of tensors."""
