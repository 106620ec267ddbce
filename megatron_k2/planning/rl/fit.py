"""Whether a run of reinforcement learning fits, phase by phase; the fewest nodes of a replica."""

from megatron_k2.errors import UserError
from megatron_k2.planning.cost.memory import RESERVED_GB
from megatron_k2.planning.gpus import GPUS_PER_NODE
from megatron_k2.planning.memory_fit import HOST_GB_PER_GPU
from megatron_k2.planning.rl.memory import ON_GPU, Held, RlMemory, held, latent_bytes
from megatron_k2.planning.rl.request import EngineLayout, RlRequest

NODES = (1, 2, 4, 8, 16)
"""Of a replica, that are tried."""


def plan_memory(r: RlRequest, reserved_gb: float = RESERVED_GB) -> RlMemory:
    """The phases on the fullest GPU.

    Args:
        r: the run.
        reserved_gb: for what is not counted of the trainer; at least what it keeps asleep.

    Raises:
        UserError: where a phase does not fit, with the arithmetic and what would.
    """
    found = held(r, reserved_gb)
    for phase in found.phases:
        _check_gpu(r, phase)
        _check_host(r, phase)
    _check_cache(r, found)
    return found


def _arithmetic(phase: Held) -> str:
    parts = [(name, getattr(phase, name) / 1e9) for name in ON_GPU]
    return " + ".join(f"{name.replace('_', ' ')} {gb:.1f}" for name, gb in parts if gb)


def _check_gpu(r: RlRequest, phase: Held) -> None:
    room = r.trainer.gpu.memory_gb
    if phase.total <= room * 1e9 * (1 + 1e-9):
        return
    way_out = (
        "more offload, or more GPUs (layout.world_size)"
        if phase.phase == "train"
        else f"engines.nodes_per_replica={2 * r.engines.nodes_per_replica}, or "
        f"engines.tp={min(2 * r.engines.tp, GPUS_PER_NODE)}"
    )
    raise UserError(
        f"phase {phase.phase}: {phase.total / 1e9:.1f} GB on a GPU of {room:g} "
        f"({_arithmetic(phase)}); take {way_out}"
    )


def _check_host(r: RlRequest, phase: Held) -> None:
    if phase.on_host <= HOST_GB_PER_GPU * 1e9:
        return
    raise UserError(
        f"phase {phase.phase}: {phase.on_host / 1e9:.0f} GB of host memory a GPU, and a node has "
        f"{HOST_GB_PER_GPU * GPUS_PER_NODE:,.0f} GB for {GPUS_PER_NODE} (report 2.4.1); take more "
        "GPUs (layout.world_size)"
    )


def slots_that_fit(r: RlRequest, cache_tokens: int) -> int:
    """The most answers that a replica's cache holds, at the length that a busy slot has."""
    e = r.engines
    return int(cache_tokens / r.lengths.held) * e.groups


def _check_cache(r: RlRequest, found: RlMemory) -> None:
    e, longest = r.engines, r.lengths.prompt + r.lengths.most
    said = (
        f"the cache has {found.cache_tokens:,} tokens a group of {e.tp} GPUs "
        f"({found.rollout.cache / 1e9:.1f} GB, left by {_arithmetic(_without_cache(found))}; "
        f"{latent_bytes(r.trainer.preset):,} bytes a token)"
    )
    if found.cache_tokens < longest:
        raise UserError(
            f"phase rollout: {said}, and one answer may have {longest:,}; take "
            f"engines.nodes_per_replica={2 * e.nodes_per_replica}, or shorter answers"
        )
    if e.slots > (most := slots_that_fit(r, found.cache_tokens)):
        raise UserError(
            f"phase rollout: {said}, and {e.slots} answers in {e.groups} groups hold "
            f"{r.lengths.held:,.0f} each; take engines.slots={most} or fewer"
        )


def _without_cache(found: RlMemory) -> Held:
    values = {name: getattr(found.rollout, name) for name in ON_GPU if name != "cache"}
    return Held("rollout", **values)


def fewest_nodes(r: RlRequest, slots: int) -> EngineLayout:
    """EngineLayout of ``r`` with as few nodes a replica as hold weights and cache.

    Args:
        r: whose engines say what else they are; on as many nodes as there are.
        slots: of all replicas together.

    Raises:
        UserError: where no number of nodes does; of the most that were tried.
    """
    nodes = [n for n in NODES if n <= r.engines.nodes]
    for n in nodes:
        replicas = r.engines.nodes // n
        engines = r.engines.replace(replicas=replicas, nodes_per_replica=n, slots=slots // replicas)
        try:
            plan_memory(r.replace(engines=engines))
        except UserError:
            if n == nodes[-1]:
                raise
        else:
            return engines
    raise UserError(f"{r.engines}: no node")
