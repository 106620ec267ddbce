"""An OpenAI-compatible server over any engine of ``engine/protocol.py``."""
