"""How new weights reach an engine: what was sent, in which buckets, in which files."""
