"""Supervised fine-tuning: dialogues to packed sequences, and training on them."""
