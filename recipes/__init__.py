"""Complete run configurations, one function each. Importable as ``megatron_k2.recipes``."""
