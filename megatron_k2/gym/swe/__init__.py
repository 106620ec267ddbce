"""Repositories with a fault, mended by an edit, judged by tests that the edit does not see."""
