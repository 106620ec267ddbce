"""Rewards: verifiable, budgets, and the model's own judgement, trusted as far as calibrated."""
