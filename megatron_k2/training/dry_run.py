"""Every distinct rank of a run, really built at full size on the meta device, in one process.

Megatron parses and validates the run's own flags, makes its process groups over a group that
communicates nothing (torch's ``fake`` backend), and builds each stage's modules without memory.
What a cluster would say after hours in a queue is said here in seconds: flags that contradict each
other, layers that fit no stage, a parameter that MuonClip cannot classify, a rank that holds more
than was planned. MuonClip's plan is made too, for all data-parallel ranks of the stage: who
orthogonalises what, and the bytes of every rank's states, on the device and on the host.

Modules that need Transformer Engine are replaced by ours of the same parameters (``SUBSTITUTES``);
its own names and shapes at full size are checked in ``make test-te``.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_k2.errors import UserError
from megatron_k2.flags.layout import layout_flags, speed_flags
from megatron_k2.planning.cost.memory import (
    ADAMW_STATE_BYTES,
    MUON_STATE_BYTES,
    RESERVED_GB,
    Parameters,
    rank_memory,
    rank_parameters,
)
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.schedule.chunks import distinct_ranks

SUBSTITUTES = (
    ("TELinear, TEColumnParallelLinear, TERowParallelLinear", "Megatron's local linears"),
    ("TELayerNormColumnParallelLinear", "a local norm, then a local linear"),
    ("TEGroupedMLP", "GroupedExperts"),
    ("TEDotProductAttention", "MLACoreAttention"),
    ("TENorm", "RMSNorm"),
)
"""(Transformer Engine's module, what stands for it)."""
NEEDS_TE = frozenset({"--delay-wgrad-compute", "--overlap-moe-expert-parallel-comm"})
"""Flags that Megatron refuses without Transformer Engine; left out, they change no parameter."""


@dataclass(frozen=True)
class BuiltRank:
    """One pipeline rank as Megatron built it."""

    ranks: tuple[int, ...]
    """Pipeline ranks that hold the same; the first was built."""
    layers: tuple[int, ...]
    """Number of layers of each virtual stage."""
    parameters: Parameters
    num_matrices: int
    """Weight matrices on this rank that MuonClip orthogonalises."""
    num_modules: int
    optimizer: "BuiltOptimizer"
    seconds: float


@dataclass(frozen=True)
class BuiltOptimizer:
    """MuonClip's plan over the ranks that share a stage."""

    num_ranks: int
    """Ranks that share the stage's dense matrices."""
    imbalance: float
    """FLOPs of the busiest rank over the least that any plan could give it."""
    on_device: int
    """Bytes of states of the fullest rank."""
    on_host: int
    total_bytes: float
    """Bytes of everything on the fullest rank's device, at the fullest moment."""


@contextlib.contextmanager
def _fake_world(r: RunRequest, rank: int) -> Iterator[None]:
    """This process as ``rank`` of the whole world, with Megatron's groups and no peers."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(r.world_size), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=r.world_size)
    try:
        parallel_state.initialize_model_parallel(
            r.tp,
            r.pp,
            r.vpp if r.vpp > 1 else None,
            context_parallel_size=r.cp,
            expert_model_parallel_size=r.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,  # gloo over a fake store crashes the process
        )
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _refusals_in_words() -> Iterator[None]:
    """What Megatron prints is dropped; what it refuses becomes a ``UserError`` with its words."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"Megatron refuses these flags: {error or error!r}") from error
    except SystemExit as error:  # argparse
        last = said.getvalue().strip().splitlines()[-1:]
        raise UserError(f"Megatron refuses these flags: {''.join(last)}") from error


def _arguments(r: RunRequest, extra: list[str]) -> Any:
    """Megatron's own parse and validation of the run's flags."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_k2.flags.megatron import add_k2_arguments, expand

    speed = [flag for flag in speed_flags(r) if flag not in NEEDS_TE]
    flags = expand(
        ["--preset", r.preset.name, "--mock-data", *layout_flags(r), *speed, *extra], cuda=True
    )
    before, sys.argv = sys.argv, ["megatron-k2 plan", *flags]
    try:
        args = parse_args(add_k2_arguments)
        validate_args(args)
    finally:
        sys.argv = before
    args.padded_vocab_size = r.preset.vocab_size
    return args


def _build(r: RunRequest, args: Any) -> list[torch.nn.Module]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_k2.model.build import K2ModelBuilder, model_config_from_args

    config = model_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stages: list[int | None] = list(range(r.vpp)) if r.vpp > 1 else [None]
    with torch.device("meta"):
        return [K2ModelBuilder(config).build_model(groups, vp_stage=stage) for stage in stages]


def _counted(model: list[torch.nn.Module]) -> tuple[Parameters, int]:
    """(elements by optimizer and group, matrices), as MuonClip classifies what was built."""
    from megatron_k2.optimizer.param_groups import muon_matrices

    specs = muon_matrices(model)
    everything = sum(p.numel() for chunk in model for p in chunk.parameters())
    expert = sum(p.numel() for p, spec in specs.items() if spec.is_expert)
    muon = sum(p.numel() for p in specs)
    matrices = sum(spec.num_blocks for spec in specs.values())
    return Parameters(muon - expert, expert, everything - muon), matrices


def plan_optimizer(
    r: RunRequest, ranks: tuple[int, ...], num_matrices: int, reserved_gb: float
) -> BuiltOptimizer:
    """MuonClip's plan of the first of ``ranks``, which are alike.

    Args:
        r: the run.
        ranks: pipeline ranks.
        num_matrices: as the built model has them.
        reserved_gb: for what is not counted.

    Raises:
        UserError: where the plan has other matrices than the model, or other bytes than the
            closed form.
    """
    from megatron_k2.planning.muonclip.model import plan_stage

    rank = ranks[0]
    chunks = tuple(chunk for chunk in r.chunks() if chunk.rank == rank)
    plan = plan_stage(r.preset, r, ranks, chunks)
    planned_matrices = sum(group.num_matrices for group in plan.groups)
    if planned_matrices != num_matrices:
        raise UserError(
            f"pipeline rank {rank}: MuonClip plans {planned_matrices} matrices, the model has "
            f"{num_matrices}"
        )
    held = rank_parameters(r, rank)
    expected = MUON_STATE_BYTES * (held.total - held.adamw) + ADAMW_STATE_BYTES * held.adamw
    found = sum(size for group in plan.groups for shards in group.states for size in shards)
    if found != expected:
        raise UserError(
            f"pipeline rank {rank}: optimizer states of all its ranks are {found:,} bytes, planned "
            f"are {expected:,}"
        )
    fullest = [max(group.state_bytes(r.optimizer_offload)) for group in plan.groups]
    on_device, on_host = (sum(part) for part in zip(*fullest, strict=True))
    memory = rank_memory(r, rank, reserved_gb)
    return BuiltOptimizer(
        num_ranks=plan.groups[-1].grid.size,
        imbalance=max(plan.loads) / plan.floor,
        on_device=on_device,
        on_host=on_host,
        total_bytes=memory.total - memory.optimizer + on_device,
    )


def build_rank(
    r: RunRequest, rank: int, same: tuple[int, ...], extra: list[str], reserved_gb: float
) -> BuiltRank:
    """Build pipeline rank ``rank`` and compare it with the plan.

    Raises:
        UserError: where Megatron refuses the flags, or what it builds is not what was planned.
    """
    from megatron_k2.host.cpu import cpu_host, meta_host

    start = time.perf_counter()
    world_rank = rank * (r.world_size // r.pp)
    with cpu_host(), _fake_world(r, world_rank), meta_host(), _refusals_in_words():
        model = _build(r, _arguments(r, extra))
        parameters, num_matrices = _counted(model)
    planned = rank_parameters(r, rank)
    if parameters != planned:
        raise UserError(f"pipeline rank {rank}: Megatron built {parameters}, planned is {planned}")
    return BuiltRank(
        ranks=same,
        layers=tuple(len(chunk.layers) for chunk in r.chunks() if chunk.rank == rank),
        parameters=parameters,
        num_matrices=num_matrices,
        num_modules=sum(1 for chunk in model for _ in chunk.modules()),
        optimizer=plan_optimizer(r, same, num_matrices, reserved_gb),
        seconds=time.perf_counter() - start,
    )


def dry_run(
    r: RunRequest, extra: list[str] | None = None, reserved_gb: float = RESERVED_GB
) -> Iterator[BuiltRank]:
    """Build every distinct pipeline rank of ``r``, one after another.

    Args:
        r: the run; checked first.
        extra: further flags, Megatron's or ours, as they would follow ``pretrain``.
        reserved_gb: for what is not counted.
    """
    r.check()
    for rank, same in distinct_ranks(r.chunks(), r.preset.num_dense_layers).items():
        yield build_rank(r, rank, same, extra or [], reserved_gb)
