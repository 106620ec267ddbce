"""Hugging Face releases: weights, config and the files beside them."""
