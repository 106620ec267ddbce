"""Harmful requests that are to be declined, and their benign twins that are to be served."""
