"""Mathematics and the sciences: a final answer, equal to the reference or not."""
