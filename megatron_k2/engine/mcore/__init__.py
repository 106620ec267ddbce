"""Evaluation and generation over Megatron-Core's own model, at any parallel layout."""
