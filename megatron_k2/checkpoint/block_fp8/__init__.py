"""Block-scaled FP8 weights, as DeepSeek-V3 and Kimi K2 release them."""
