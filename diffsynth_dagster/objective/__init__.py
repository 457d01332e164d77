"""Schedules, noising paths, randomness and losses: pure functions of tensors."""
