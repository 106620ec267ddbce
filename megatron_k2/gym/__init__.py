"""Tasks whose answers a program can verify: right, wrong, or not known."""
