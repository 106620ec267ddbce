"""Fine-tune a Kimi-K2-class model: torchrun --nproc-per-node N examples/sft_k2.py <flags>.

The same program as ``megatron-k2 sft``, for those who start ranks themselves (Slurm, torchrun on
several nodes). ``--preset`` and ``--data`` are expanded; every other flag is Megatron's.
"""

from megatron_k2.sft.train import SFT
from megatron_k2.training.pretrain import main

if __name__ == "__main__":
    main(SFT)
