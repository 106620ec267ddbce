"""Conversion as jobs that read rows of bounded size and write files."""
