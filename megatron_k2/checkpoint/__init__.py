"""Checkpoints: Megatron's distributed format to and from Hugging Face's."""
