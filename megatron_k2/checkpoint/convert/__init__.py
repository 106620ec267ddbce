"""Conversion between Hugging Face releases and Megatron checkpoints."""
