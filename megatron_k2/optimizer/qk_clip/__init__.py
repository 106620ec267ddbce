"""QK-Clip: the heads' maximum logits, the factors, and the rows they scale."""
