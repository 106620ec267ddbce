"""Instruction following: constraints that code checks, on an answer that is there and on task."""
