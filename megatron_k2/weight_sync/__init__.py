"""Weights of a live sharded model, on their way into running engines."""
