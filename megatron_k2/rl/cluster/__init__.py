"""Reinforcement learning over many processes and nodes: who meets, who waits, who recovers."""
