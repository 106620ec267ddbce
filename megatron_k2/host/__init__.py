"""Repairs of the hosts by name, and the CPU as a host of Megatron."""
