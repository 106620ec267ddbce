"""Reinforcement learning as in the report: objective, log-probabilities, schedules."""
