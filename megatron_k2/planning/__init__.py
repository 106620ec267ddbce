"""Arithmetic about a run before it is launched. Nothing here needs torch."""
