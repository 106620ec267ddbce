"""How much has to go to host memory for a run to fit, and what comes close where nothing does.

The report (section 2.4.4) offloads all activations that recompute and FP8 leave, and part of the
optimizer's states on few nodes (2.4.2). Here: activations first, since they are prefetched under
arithmetic, up to all but what the current micro-batches use; then optimizer states.
"""

import bisect
import itertools
import math

from megatron_k2.errors import UserError
from megatron_k2.planning.cost.memory import RESERVED_GB, rank_memory
from megatron_k2.planning.cost.offload import movable
from megatron_k2.planning.gpus import GPUS, GPUS_PER_NODE
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.schedule.pipeline import ScheduleShape, num_warmup

STEP = 0.05
"""Fractions are chosen in twentieths."""
ON_DEVICE = 3
"""Micro-batches of a chunk whose activations are on the device at any time: the forward's, the
backward's and the one being prefetched. Ours."""
HOST_GB_PER_GPU = 2000 / GPUS_PER_NODE
"""Report 2.4.1: 2 TB a node."""


def most_activations(r: RunRequest) -> float:
    """The part of activations that can be on the host: all in flight but ``ON_DEVICE``.

    Of the second rank, which holds the most; and no more than Megatron's offload can move; in whole
    ``STEP``.
    """
    rank = min(1, r.pp - 1)
    shape = ScheduleShape(r.pp, r.vpp, r.num_microbatches, r.has_overlap and r.vpp > 1)
    in_flight = min(num_warmup(shape, rank) + 1, r.num_microbatches * r.vpp)
    part = min(1 - ON_DEVICE / in_flight, movable(r).part)
    return max(0, math.floor(part / STEP + 1e-9)) * STEP


def shortfall(r: RunRequest, reserved_gb: float = RESERVED_GB) -> float:
    """Bytes by which the fullest rank exceeds its GPU; negative where there is room."""
    fullest = max(rank_memory(r, rank, reserved_gb).total for rank in range(r.pp))
    return fullest - r.gpu.memory_gb * 1e9


def _least(r: RunRequest, field: str, most: float, reserved_gb: float) -> RunRequest:
    """The smallest value of ``field`` that fits, else the largest allowed; more needs less."""

    def at(step: int) -> RunRequest:
        return r.replace(**{field: round(step * STEP, 2)})

    steps = range(math.floor(most / STEP + 1e-9))
    found = bisect.bisect_left(steps, True, key=lambda step: shortfall(at(step), reserved_gb) <= 0)
    return at(found) if found < len(steps) else r.replace(**{field: round(most, 2)})


def fit_to_memory(
    r: RunRequest, reserved_gb: float = RESERVED_GB, fixed: frozenset[str] = frozenset()
) -> RunRequest:
    """``r`` with the least offload that fits.

    Args:
        r: the run.
        reserved_gb: for what is not counted.
        fixed: of ``activation_offload`` and ``optimizer_offload``, what stays as it is.

    Raises:
        UserError: where even all of it does not, naming what is missing and what would help.
    """
    if "activation_offload" not in fixed:
        r = _least(r, "activation_offload", most_activations(r), reserved_gb)
    if shortfall(r, reserved_gb) > 0 and "optimizer_offload" not in fixed:
        r = _least(r, "optimizer_offload", 1.0, reserved_gb)
    short = shortfall(r, reserved_gb)
    if short > 0:
        raise UserError(
            f"{short / 1e9:.1f} GB a GPU too much, with everything offloaded that can "
            f"be; what fits: {', or '.join(_ways_out(r, reserved_gb))}"
        )
    on_host = [rank_memory(r, rank, reserved_gb) for rank in range(r.pp)]
    host = max(m.optimizer_on_host + m.activations_on_host for m in on_host)
    if host > HOST_GB_PER_GPU * 1e9:
        raise UserError(
            f"{host / 1e9:.0f} GB a GPU would go to host memory, which has {HOST_GB_PER_GPU:.0f} "
            f"GB for each (2 TB a node); {', or '.join(_ways_out(r, reserved_gb))}"
        )
    return r


def _ways_out(r: RunRequest, reserved_gb: float) -> list[str]:
    """The nearest changes that fit, each alone."""
    found = []
    larger = (gpu for gpu in GPUS.values() if gpu.memory_gb > r.gpu.memory_gb)
    for gpu in sorted(larger, key=lambda gpu: gpu.memory_gb):
        if shortfall(r.replace(gpu=gpu), reserved_gb) <= 0:
            found.append(f"--gpu {gpu.name} ({gpu.memory_gb:g} GB)")
            break
    for factor, wider in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        world, ep = r.world_size * factor, r.ep * wider
        if r.preset.num_moe_experts % ep or world % (r.pp * ep):
            continue
        changed = r.replace(world_size=world, ep=ep)
        if changed.num_microbatches and shortfall(changed, reserved_gb) <= 0:
            return [*found, f"--world-size {world} --ep {ep}"]
    return found or ["a smaller model, sequence or micro-batch would"]
