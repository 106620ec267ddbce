"""Whether what was converted equals what it was made from."""
