"""Time to bring new weights from the training ranks to engines on the same GPUs.

As the report has it (2.4.3 and appendix G): every GPU keeps its share of the weights in host
memory; all copy a buffer of it to the device at once, then each share in turn is broadcast to all,
and engines load one buffer while the next is under way. On GPUs whose broadcast goes over PCIe too
the copy and the broadcast do not overlap (two stages), which is planned. Loading is at the memory's
rate and hidden. Not stated, and chosen here as a bound: a byte enters a node once, over one
network card, and goes on within the node meanwhile; over all of its cards it would be faster.
"""

from dataclasses import dataclass

from megatron_k2.planning.cost.memory import BLOCK_FP8_BYTES, WEIGHT_BYTES
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.planning.estimate import Assumptions
from megatron_k2.planning.gpus import GPUS_PER_NODE, Gpu
from megatron_k2.presets import ModelPreset

_BIAS_BYTES = 4
"""Of a router's selection bias."""


@dataclass(frozen=True)
class WeightUpdate:
    """One round to every engine."""

    num_bytes: float
    """Of the model, as engines hold it."""
    share_bytes: float
    """Of it a GPU's: copied in a round, and at start-up read from the disk, once in all."""
    copy_seconds: float
    """Host memory to device, on all GPUs at once."""
    broadcast_seconds: float

    @property
    def seconds(self) -> float:
        """One after the other."""
        return self.copy_seconds + self.broadcast_seconds


def model_bytes(p: ModelPreset, *, is_fp8: bool) -> float:
    """Of a model's weights in an engine: bf16, or the layers' linears in block FP8.

    Each weight in block FP8 counts its part of a scale: blocks that an edge cuts count in part.
    """
    n = count_parameters(p)
    latent_norms = p.kv_lora_rank + (p.q_lora_rank or 0)
    linears = (
        p.num_layers * (n.attention_per_layer - latent_norms)
        + p.num_dense_layers * n.dense_ffn
        + p.num_moe_layers * (p.num_moe_experts * n.expert + n.shared_experts)
    )
    rate = BLOCK_FP8_BYTES if is_fp8 else WEIGHT_BYTES
    others = WEIGHT_BYTES * (n.trainable - linears) + _BIAS_BYTES * n.router_biases
    return rate * linears + others


def weight_update(
    p: ModelPreset, gpu: Gpu, world_size: int, a: Assumptions, *, is_fp8: bool
) -> WeightUpdate:
    """What a round takes.

    Args:
        p: the model.
        gpu: its links.
        world_size: GPUs that train and answer.
        a: parts of the links' rates.
        is_fp8: whether engines hold block FP8.
    """
    num_bytes = model_bytes(p, is_fp8=is_fp8)
    share = num_bytes / world_size
    if world_size <= GPUS_PER_NODE:
        rate = gpu.nvlink_gb_per_s * a.part("nvlink")
    else:
        rate = gpu.network_gb_per_s * a.network
    copy = share / (gpu.pcie_gb_per_s * 1e9 * a.part("host"))
    broadcast = (num_bytes - share) / (rate * 1e9)
    return WeightUpdate(num_bytes, share, copy, broadcast)
