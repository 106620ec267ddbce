"""megatron_k2: Kimi-K2-class training as a plugin of unmodified Megatron-Core.

Importing this package imports neither torch nor Megatron and patches nothing.
"""

__version__ = "0.1.0"
