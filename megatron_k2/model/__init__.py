"""The Kimi K2 model as Megatron module specs."""
