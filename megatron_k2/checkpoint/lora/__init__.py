"""Adapters on disk: Megatron's checkpoints of them, merged into a base, and as PEFT keeps them."""
