"""Megatron's chain of MuonClip and AdamW without ZeRO."""

from collections.abc import Iterator
from typing import Any, override

import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_k2.optimizer.adamw import fuse_on_cpu
from megatron_k2.optimizer.foreign_state import (
    adopt_groups,
    inner,
    parts,
    take_over,
    upstream_momentum,
)
from megatron_k2.optimizer.muonclip_chain import MuonAdamWChain
from megatron_k2.optimizer.plain import MuonClip
from megatron_k2.optimizer.sharded.checkpoint_by_name import sharded_scalars

PEAKS = "muon_peaks"
"""Key of the idle floor's state in the first optimizer's part of a checkpoint."""


class PlainMuonClipChain(MuonAdamWChain):
    """The registry's chain, turned into this class by ``muonclip.build``.

    Its checkpoint format is Megatron's; what Megatron's own ``muon`` wrote loads
    (``foreign_state``). The idle floor's state is one number a matrix, which Megatron has no place
    for: it is gathered from all ranks and saved beside the tensors. Checkpoints from before this
    have none, and their peaks begin anew.

    Attributes:
        peak_views: name of a parameter's matrices in any layout -> their peaks on this rank.
    """

    peak_views: dict[str, Tensor]

    @override
    def adamw_parameters(self, optimizer: MegatronOptimizer) -> list[Tensor]:
        return [] if isinstance(optimizer.optimizer, MuonClip) else optimizer.get_parameters()

    @override
    def muon_of(self, optimizer: MegatronOptimizer) -> MuonClip | None:
        return optimizer.optimizer if isinstance(optimizer.optimizer, MuonClip) else None

    @override
    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        described = super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        self.peak_views = dict(self._named_peaks(model_sharded_state_dict))
        if is_loading:  # the file's groups need not be as many as ours
            for part in parts(described):
                del inner(part)["param_groups"]
        else:
            inner(parts(described)[0])[PEAKS] = self._gathered_peaks()
        return described

    def _named_peaks(self, model_sharded_state_dict: Any) -> Iterator[tuple[str, Tensor]]:
        for optimizer in self._with_parameters():
            muon = self.muon_of(optimizer)
            if muon is None or muon.matrix_group.peaks is None:
                continue
            muon.matrix_group.share_peaks()
            matrices = muon.matrix_group.matrices
            params = [matrix.param for matrix in matrices]
            entries = get_param_id_to_sharded_param_map(model_sharded_state_dict, iter(params))
            for number, matrix in enumerate(matrices):
                values = muon.matrix_group.peaks_of(matrix.param)
                place = sharded_scalars(entries[number], values, PEAKS, 0)
                # Heads of another tensor-parallel rank are other matrices of the same parameter.
                rank = entries[number].global_offset if matrix.spec.has_whole_blocks else ""
                yield f"{place.key} {place.global_offset} {rank}", values

    def _gathered_peaks(self) -> dict[str, list[float]]:
        """Of every rank; each that has a part of a matrix has the same number."""
        own = {name: values.tolist() for name, values in self.peak_views.items()}
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, own)
        return {name: values for of_one in of_all for name, values in of_one.items()}

    @override
    def load_state_dict(self, state_dict: Any) -> None:
        peaks = inner(parts(state_dict)[0]).pop(PEAKS, {})
        mu = upstream_momentum(state_dict)
        own_groups = [o.optimizer.state_dict()["param_groups"] for o in self.chained_optimizers]
        if mu is None:
            adopt_groups(state_dict, own_groups)
        else:
            take_over(state_dict, mu, own_groups)
        super().load_state_dict(state_dict)
        for name, values in self.peak_views.items():
            if len(peaks.get(name, ())) == values.numel():
                values.copy_(values.new_tensor(peaks[name]))
        fuse_on_cpu(self)
