"""Reinforcement learning's plan: memory by phase, seconds and tokens of an iteration."""
