"""Leave the terminal to the result."""

import logging
import warnings


def quieten() -> None:
    """No word on absent CUDA, Transformer Engine or apex; ``megatron-k2 doctor`` says it once."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
