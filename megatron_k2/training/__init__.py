"""What Megatron's own training loop asks of a plugin."""
