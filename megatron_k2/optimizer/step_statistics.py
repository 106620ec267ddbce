"""What Muon's part of a step did, for the log: how large its updates were, where its time went.

With ``--log-muon-steps`` only, since each update's norm is one pass more. Sums stay on the device
and are reduced after the step; seconds are taken from the clock on a CPU and from events on a GPU,
and are asked for when the host has waited for the step anyway. Nothing is read back inside it.

The update of a group is what ``η`` multiplies, without decay: 0.2 sqrt(max(n, m)) U Vᵀ of Muon's
matrices, the bias-corrected moments' quotient of AdamW's parameters. Matching the first one's root
mean square to the second's is what the report's 0.2 is for.
"""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["exchange", "newton_schulz"]
PARTS: tuple[Part, ...] = ("exchange", "newton_schulz")
GROUPS = ("dense", "experts", "adamw")
"""Muon's dense matrices, its experts, and AdamW's parameters."""


class StepStatistics:
    """Sums over the updates of one matrix group in one step, and the seconds of its two parts.

    Args:
        are_experts: of each placement.
        device: where the updates are.

    Attributes:
        sums: [2, 2] fp64 on the device, dense matrices and experts of this rank's homes: the sum
            of max(rows, cols) ‖U Vᵀ‖_F² and the number of elements.
    """

    def __init__(self, are_experts: Sequence[bool], device: torch.device) -> None:
        self._are_experts, self._device = are_experts, device
        self._groups: dict[tuple[int, ...], Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Set the sums to zero and drop the laps of the step before, at the start of a step."""
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=self._device)
        self._laps: dict[Part, list[tuple[Any, Any]]] = defaultdict(list)

    def add(self, updates: Tensor, indices: tuple[int, ...]) -> None:
        """Add the squared norms and sizes of a batch of updates to ``sums``.

        Args:
            updates: [k, rows, cols], U Vᵀ of whole matrices.
            indices: their placements.
        """
        if indices not in self._groups:
            groups = [int(self._are_experts[index]) for index in indices]
            self._groups[indices] = torch.tensor(groups, device=self._device)
        squares = torch.linalg.vector_norm(updates, dim=(-2, -1), dtype=torch.float32).double() ** 2
        rows, cols = updates.shape[-2:]
        numels = torch.full_like(squares, rows * cols)
        values = torch.stack([squares * max(rows, cols), numels], dim=1)
        self.sums.index_add_(0, self._groups[indices], values)

    @contextlib.contextmanager
    def timing(self, part: Part) -> Iterator[None]:
        """Add what runs inside to the seconds of ``part``: on a GPU, those of the current stream.

        Of the exchange that is what computation does not hide: starting it and waiting for it.
        """
        start = self._now()
        yield
        self._laps[part].append((start, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, part: Part) -> float:
        """Seconds of ``part`` in the step; -inf where the device is not done yet. Does not wait."""
        laps = self._laps[part]
        if self._device.type != "cuda":
            return math.fsum(end - start for start, end in laps)
        if not all(end.query() for _, end in laps):
            return -math.inf
        return math.fsum(start.elapsed_time(end) for start, end in laps) / 1e3


def adamw_update_sums(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """[2] fp64 on the device: the sum of squares and the number of elements of AdamW's last update.

    Args:
        parameters: some of ``optimizer``'s.
        optimizer: whose state has ``exp_avg`` and ``exp_avg_sq``; the number of its steps is a
            tensor there (torch) or in the group (Transformer Engine).
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    numel = 0
    for param in parameters:
        state, group = optimizer.state[param], groups[id(param)]
        if "exp_avg" not in state:
            continue
        beta1, beta2 = group["betas"]
        steps = state.get("step", group.get("step"))
        mean = state["exp_avg"] / (1 - beta1**steps)
        root = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        total += torch.linalg.vector_norm(mean.div_(root)).double() ** 2
        numel += param.numel()
    return torch.stack([total, torch.full_like(total, numel)])
