"""A run's parallel layout, and checks on it before anything is started. Pure arithmetic.

Megatron checks most of this too, but after seconds of start-up, on every rank at once, and two
layouts it computes silently wrong.
"""

import math
from dataclasses import dataclass, field

from megatron_k2.errors import UserError
from megatron_k2.parallel.pipeline_split import PipelineSplit

MEGATRON_NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
"""A degree's field in ``Layout`` -> its name in Megatron's arguments and ``parallel_state``."""


@dataclass(frozen=True)
class Layout:
    """The ranks of a run, and the degree of each kind of parallelism.

    Short names: formulas, tables, ``plan``'s flags and ``--set layout.tp=2`` use them, and a line
    of arithmetic has room for four. ``MEGATRON_NAMES`` translates where Megatron is spoken to.
    """

    world_size: int = 1
    tp: int = 1
    """Tensor-parallel ranks of attention, dense layers, embedding and head."""
    pp: int = 1
    """Pipeline-parallel ranks: the layers are split over them."""
    ep: int = 1
    """Ranks that a layer's routed experts are spread over."""
    vpp: int = 1
    """Virtual stages: model chunks that a pipeline rank holds."""
    cp: int = 1
    """Context-parallel ranks, each with its part of every sequence."""
    etp: int = 1
    """Tensor-parallel ranks inside a routed expert."""
    pipeline_layout: str | None = None
    """Megatron's ``--pipeline-model-parallel-layout``, which places the layers by hand."""
    split: PipelineSplit = field(default_factory=PipelineSplit)
    """Megatron's other flags that place them."""

    @property
    def data_parallel(self) -> int:
        """Replicas of the model, each with its own sequences."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def data_ranks(self) -> int:
        """Ranks that share the optimizer's state of a dense parameter: data x context parallel."""
        return self.world_size // (self.tp * self.pp)

    @property
    def expert_data_ranks(self) -> int:
        """Ranks that hold the same experts and share their optimizer's state."""
        return self.world_size // (self.pp * self.ep * self.etp)

    @property
    def is_sequence_parallel(self) -> bool:
        """Always with TP: Megatron's experts require it, and it only saves memory."""
        return self.tp > 1

    @property
    def is_split_by_hand(self) -> bool:
        """Whether layers need not divide by PP and VPP."""
        return self.pipeline_layout is not None

    def megatron_sizes(self) -> dict[str, int]:
        """The five degrees under Megatron's names, as ``initialize_model_parallel`` takes them."""
        return {name: getattr(self, field) for field, name in MEGATRON_NAMES.items()}

    def degree_flags(self) -> list[str]:
        """The five degrees as Megatron's flags, and ``--sequence-parallel`` where it is on."""
        sizes = self.megatron_sizes().items()
        flags = [word for name, n in sizes for word in (f"--{name.replace('_', '-')}", str(n))]
        return [*flags, "--sequence-parallel"] if self.is_sequence_parallel else flags


@dataclass(frozen=True)
class Workload:
    """What a layout must divide: sizes of the model, of a sequence in tokens, and of a batch."""

    num_layers: int
    num_attention_heads: int
    num_moe_experts: int | None
    """Routed experts of a layer; ``None`` for a dense model."""
    seq_length: int
    global_batch_size: int
    """Sequences of one optimizer step, over all replicas."""
    micro_batch_size: int = 1
    """Sequences that pass through a rank at once."""
    overlap_p2p_comm: bool = True
    """Megatron's: sends and receives of the pipeline go one by one, not in batches."""


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor of ``number`` below ``wanted`` and the smallest above, if any."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return below + above


def nearest_multiples(number: int, unit: int) -> list[int]:
    """The multiples of ``unit`` around ``number``, which is none; positive ones only."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _must_divide(name: str, number: int, by_name: str, by: int) -> None:
    if number % by:
        near = _listed(nearest_divisors(number, by))
        raise UserError(f"{name}={number} does not divide by {by_name}={by}; nearest: {near}")


def check_degrees(layout: Layout) -> None:
    """Refuse degrees below 1.

    Raises:
        UserError: naming the first.
    """
    sizes = {"world_size": layout.world_size, **layout.megatron_sizes()}
    for name, size in {**sizes, "num_virtual_stages": layout.vpp}.items():
        if size < 1:
            raise UserError(f"{name}={size}: expected at least 1")


def check_layout(r: Layout, load: Workload) -> None:
    """Refuse a layout that cannot run, or that Megatron would compute wrongly.

    Args:
        r: degrees.
        load: what they must divide.

    Raises:
        UserError: naming the value, what it must divide by, and the nearest that does.
    """
    check_degrees(r)
    for name in ("global_batch_size", "micro_batch_size"):
        if getattr(load, name) < 1:
            raise UserError(f"{name}={getattr(load, name)}: expected at least 1")
    tp, pp, cp = r.tp, r.pp, r.cp
    model_ranks = tp * pp * cp
    if r.world_size % model_ranks:
        raise UserError(
            f"world size {r.world_size} does not divide by TP x PP x CP = {tp} x {pp} x {cp} = "
            f"{model_ranks}; start a multiple of {model_ranks} ranks"
        )
    expert_ranks = r.etp * r.ep * pp
    if load.num_moe_experts and r.world_size % expert_ranks:
        raise UserError(
            f"world size {r.world_size} does not divide by expert TP x EP x PP = "
            f"{r.etp} x {r.ep} x {pp} = "
            f"{expert_ranks}; start a multiple of {expert_ranks} ranks"
        )
    _must_divide("num_attention_heads", load.num_attention_heads, "tensor_model_parallel_size", tp)
    if load.num_moe_experts:
        _must_divide(
            "num_moe_experts",
            load.num_moe_experts,
            "expert_model_parallel_size",
            r.ep,
        )
    _check_sequence_and_batch(r, load)
    _check_pipeline(r, load)


def _check_sequence_and_batch(r: Layout, load: Workload) -> None:
    cp, tp = r.cp, r.tp
    zigzag = 2 * cp if cp > 1 else 1
    near = _listed(nearest_multiples(load.seq_length, math.lcm(zigzag, cp * tp)))
    if load.seq_length % zigzag:
        raise UserError(
            f"seq_length={load.seq_length} does not divide by 2 x context_parallel_size={zigzag} "
            f"(zigzag halves); nearest: {near}"
        )
    if (load.seq_length // cp) % tp:
        raise UserError(
            f"seq_length={load.seq_length} over context_parallel_size={cp} does not divide by "
            f"tensor_model_parallel_size={tp}, which sequence parallelism needs; nearest: {near}"
        )
    step = load.micro_batch_size * r.data_parallel
    if load.global_batch_size % step:
        raise UserError(
            f"global_batch_size={load.global_batch_size} does not divide by micro_batch_size x "
            f"data parallel = {load.micro_batch_size} x {r.data_parallel} = {step}; nearest: "
            f"{_listed(nearest_multiples(load.global_batch_size, step))}"
        )


def _check_pipeline(r: Layout, load: Workload) -> None:
    pp, vpp = r.pp, r.vpp
    if r.split.flags and r.is_split_by_hand:
        raise UserError(
            f"{r.split.flags[0]} does not go with --pipeline-model-parallel-layout, which places "
            "every layer; drop one of the two"
        )
    if r.split.flags:
        vpp = r.split.num_chunks(load.num_layers, pp, vpp)
    elif not r.is_split_by_hand and load.num_layers % (pp * vpp):
        raise UserError(
            f"num_layers={load.num_layers} does not divide by PP x virtual stages = {pp} x {vpp}; "
            "give --pipeline-model-parallel-layout, --decoder-first-pipeline-num-layers or "
            f"-last-, or a divisor: {_listed(nearest_divisors(load.num_layers, pp * vpp))}"
        )
    if vpp == 1:
        return
    if pp == 1:
        raise UserError("virtual pipeline stages need --pipeline-model-parallel-size above 1")
    if pp == 2 and not load.overlap_p2p_comm:
        raise UserError(
            "PP=2 with virtual stages and batched point-to-point calls exchanges the wrong tensors "
            "in Megatron-Core 0.19 (both neighbours are the same rank); drop "
            "--no-overlap-p2p-communication"
        )
