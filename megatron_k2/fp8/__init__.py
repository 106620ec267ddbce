"""FP8: compute through Transformer Engine's recipes, and activations kept for backward."""
