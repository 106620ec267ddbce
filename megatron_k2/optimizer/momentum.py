"""Muon's momentum as optimizer state, and the directions that a step makes of it."""

from typing import Any

import torch
from torch import Tensor

from megatron_k2.optimizer.muon import update_momenta
from megatron_k2.optimizer.settings import MuonClipSettings


def momentum_of(optimizer: torch.optim.Optimizer, main: Tensor) -> Tensor:
    """``momentum_buffer`` of ``main``, made of zeros where there is none yet.

    Args:
        optimizer: whose state it is.
        main: one of its parameters: an fp32 weight, master or flat shard of a master.
    """
    state: dict[str, Any] = optimizer.state[main]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(main)
    momentum: Tensor = state["momentum_buffer"]
    return momentum


def directions(
    optimizer: torch.optim.Optimizer,
    mains: list[Tensor],
    settings: MuonClipSettings,
    grad_factor: float | Tensor | None,
) -> list[Tensor]:
    """What is to be orthogonalised: momenta updated by the gradients, with or without Nesterov.

    Args:
        optimizer: that keeps the momenta.
        mains: with their reduced, unscaled gradients in ``grad``.
        settings: μ, and whether Nesterov's form is taken.
        grad_factor: see ``muon.update_momenta``.

    Returns:
        One a parameter, of its shape. Without Nesterov they are the momenta themselves, not copies.
    """
    grads: list[Any] = [main.grad for main in mains]
    return update_momenta(
        [momentum_of(optimizer, main) for main in mains],
        grads,
        settings.momentum,
        settings.nesterov,
        grad_factor,
    )
