"""Answers that must say what a context says, and nothing else."""
