"""Named repairs of Megatron's fine-grained activation offload, as in ``repairs``."""

import functools
from typing import Any

from megatron_k2.host.repairs import require_checked_megatron


def end_offload_chunk_with_its_groups() -> None:
    """Let a chunk's handler be left when none of its groups is to come, not when none is pending.

    ``ChunkOffloadHandler.finish_all_groups``
    (``core/pipeline_parallel/fine_grained_activation_offload.py:920``) takes momentarily empty
    queues for the end of the chunk; with virtual stages the manager then goes on to the next
    micro-batch's handler too early, and the second step ends in "Chunk mismatch". Repaired upstream
    after 0.19.2 (Megatron-LM #6783).
    """
    require_checked_megatron()
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler

    def finish_all_groups(self: Any, name: str | None = None) -> bool:
        first = self._offloaded_group_index
        return self.find_group_with_name(self.offload_groups, name, first) is None

    ChunkOffloadHandler.finish_all_groups = finish_all_groups


def reload_after_offload() -> None:
    """Let a reload within the backward wait for the copy to the host that it reads.

    ``ChunkOffloadHandler.tensor_pop`` (``:972``) reloads a tensor that no prefetch brought back on
    the compute stream, which nothing orders after the stream that fills the host's buffer: stale
    numbers, silently (Megatron-LM #7398, open).
    """
    require_checked_megatron()
    import torch
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler

    original = ChunkOffloadHandler.tensor_pop
    if hasattr(original, "_k2_waits"):
        return

    @functools.wraps(original)
    def tensor_pop(self: Any, tensor_tag: Any) -> torch.Tensor:
        if not isinstance(tensor_tag, torch.Tensor):
            group = self.offload_groups[tensor_tag[0] - 1]
            if isinstance(group._tensors.get(tensor_tag), tuple):  # on the host
                group.wait_offload_event(torch.cuda.current_stream())
        return original(self, tensor_tag)

    tensor_pop._k2_waits = True  # type: ignore[attr-defined]
    ChunkOffloadHandler.tensor_pop = tensor_pop
