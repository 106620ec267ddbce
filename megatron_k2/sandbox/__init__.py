"""Programs nobody has read, run within limits: one protocol, a suite that tries to get out."""
