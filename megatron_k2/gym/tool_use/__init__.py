"""Calls of tools, executed on a small world and judged by what state it is left in."""
