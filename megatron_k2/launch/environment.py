"""Environment of every rank on a cluster: NCCL, UCX, Transformer Engine. One place, with reasons.

None of this has been measured here. A profile's ``environment`` is added to it and wins.
"""

from megatron_k2.flags.layout import speed_flags
from megatron_k2.planning.request import RunRequest

CLUSTER_ENVIRONMENT = (
    ("NCCL_IB_TIMEOUT", "22", "a slow link is waited for, not declared dead, in a long run"),
    ("NCCL_NVLS_ENABLE", "0", "NVLink SHARP's buffers cost memory that activations need"),
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a lost peer ends every rank, so that Slurm sees it"),
    ("TORCH_NCCL_AVOID_RECORD_STREAMS", "1", "freed activations are reused at once"),
    ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "uneven experts fragment memory"),
    ("UCX_TLS", "rc,sm,cuda_copy,cuda_ipc", "for MPI or NVSHMEM parts; NCCL does not use UCX"),
    ("NVTE_FWD_LAYERNORM_SM_MARGIN", "16", "multiprocessors left to communication under norms"),
    ("NVTE_BWD_LAYERNORM_SM_MARGIN", "16", "likewise in the backward"),
    ("OMP_NUM_THREADS", "4", "threads a rank for data loading and checkpoints"),
    ("PYTHONUNBUFFERED", "1", "the log is complete when a node is lost"),
)
"""Triples (name, value, reason) for every rank on a cluster."""


def cluster_environment(r: RunRequest) -> dict[str, str]:
    """The environment of every rank of ``r``, name -> value.

    Expert all-to-all beside arithmetic needs many queues. Without it, tensor and context parallel
    ranks need one, so that kernels start in the order of the calls: Megatron insists on Hopper.
    """
    has_overlap = "--overlap-moe-expert-parallel-comm" in speed_flags(r)
    ordered = (r.tp > 1 or r.cp > 1) and not has_overlap
    connections = {"CUDA_DEVICE_MAX_CONNECTIONS": "1" if ordered else "32"}
    return connections | {name: value for name, value, _ in CLUSTER_ENVIRONMENT}
