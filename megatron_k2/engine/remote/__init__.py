"""Engines elsewhere, by HTTP."""
