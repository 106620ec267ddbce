"""Reinforcement learning of a Kimi-K2-class model: ``torchrun ... examples/rl_k2.py <flags>``.

The same program as ``megatron-k2 rl``, for those who start ranks themselves (Slurm, torchrun on
several nodes). ``--preset`` and the flags of ``rl`` are expanded; every other flag is Megatron's.
"""

from megatron_k2.rl.train import RL
from megatron_k2.training.pretrain import main

if __name__ == "__main__":
    main(RL)
