"""Megatron's flags: presets, layouts and data written as them, and read back."""
