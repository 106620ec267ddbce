"""An optimizer whose state is as before its first step: moments, momenta and counts are zero.

K1.5 (arXiv:2501.12599) resets its optimizer in each iteration of reinforcement learning, whose
reference policy is another one then.
"""

from typing import Any

import torch

from megatron_k2.errors import UserError
from megatron_k2.optimizer.muonclip_chain import MuonAdamWChain
from megatron_k2.optimizer.offload.optimizer import OffloadedMuonClip
from megatron_k2.optimizer.sharded.optimizer import DistributedMuonClip


@torch.no_grad()
def forget(optimizer: Any) -> None:
    """Zero the state of every optimizer in a chain, weights and masters as they are.

    Args:
        optimizer: what Megatron's factory returned.

    Raises:
        UserError: states that lie in host memory.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, OffloadedMuonClip):
            raise UserError(
                "resetting an optimizer whose states are on the host is not written; drop "
                "--optimizer-cpu-offload, or --reset-optimizer"
            )
        if getattr(part, "is_stub_optimizer", False):
            continue
        for state in part.optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine's FusedAdam counts there
                group["step"] = 0
        if isinstance(part, DistributedMuonClip):
            part.num_steps = 0
        muon = optimizer.muon_of(part) if isinstance(optimizer, MuonAdamWChain) else None
        if muon is not None and muon.matrix_group.peaks is not None:
            muon.matrix_group.peaks.zero_()
