"""Perplexity and text from a Megatron checkpoint."""
