"""Low-rank adapters (LoRA, arXiv:2106.09685) on the linears of a frozen model."""
