"""Orthogonalisation of matrices by Newton-Schulz iterations, and its cost."""
