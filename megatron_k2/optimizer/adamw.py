"""AdamW's part of a step on a CPU: one pass over its tensors.

torch runs AdamW on a CPU as a dozen operations a tensor, each a pass over memory, and reads every
parameter's step counter in Python; its fused kernel does neither. Which of them runs is a field of
the parameter group. On a GPU the host has a fused optimizer of its own and nothing is changed.
"""

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer


def fuse_on_cpu(chain: ChainedOptimizer) -> None:
    """Let every torch AdamW of ``chain`` that steps on a CPU run fused.

    That is where the gradients are: states kept on the host (``offload/optimizer.py``) visit a GPU.
    To be called again after a checkpoint was loaded, which brings its own parameter groups.
    """
    for optimizer in chain.chained_optimizers:
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.AdamW):
            continue
        buffers = getattr(optimizer, "buffers", ())
        for group in inner.param_groups:
            gradients = [buffer.grad_data for buffer in buffers] or group["params"]
            if all(tensor.device.type == "cpu" for tensor in gradients):
                group["fused"], group["foreach"] = True, False
