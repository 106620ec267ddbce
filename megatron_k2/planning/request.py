"""What a run asks for, in the planner's terms."""

from dataclasses import dataclass, replace
from typing import Literal, get_args, override

from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import Layout, Workload, check_layout
from megatron_k2.planning.gpus import GPUS_PER_NODE, Gpu
from megatron_k2.planning.schedule.chunks import Chunk, split_into_chunks
from megatron_k2.presets import ModelPreset

Recompute = Literal["norm", "swiglu", "mla_up"]
"""Kinds of values that are computed again: norm outputs; the experts' SwiGLU outputs; queries, keys
and values from the latents with the latents' norms (Megatron's ``layernorm``, ``moe_act``,
``mla_up_proj``)."""

Modules = Literal["transformer_engine", "local"]
"""The choices of Megatron's ``--transformer-impl`` that are planned."""

REPORT_RECOMPUTE: frozenset[Recompute] = frozenset({"norm", "swiglu", "mla_up"})
"""Report 2.4.4, item 1. Its optional fourth, the experts' down-projection, keeps nothing here:
routing weights are applied before it, so its output is not needed again."""


@dataclass(frozen=True, kw_only=True)
class RunRequest(Layout):
    """One training run on a cluster: a layout, and what is trained on it.

    It is a layout, so that a recipe's key is ``layout.tp``. Of the layout's fields two are not
    planned: experts are never split (``etp`` is 1), and ``chunks`` places the layers.
    """

    preset: ModelPreset
    gpu: Gpu
    seq_length: int
    """Tokens of one sequence."""
    sequences_per_step: int
    """Sequences of one step, Megatron's global batch size."""
    document_tokens: int = 0
    """Of packed documents: tokens that attention reaches over, the mean of their squares over the
    mean of their lengths; 0 for one document of the whole sequence."""
    lora_rank: int = 0
    """Of adapters on every linear, over frozen weights; 0: all of the model trains."""
    lora_base_fp8: bool = False
    """Whether the frozen linears are held in block FP8."""
    micro_batch_size: int = 1
    """Sequences that pass through a rank at once."""
    recompute: frozenset[Recompute] = REPORT_RECOMPUTE
    fp8_storage: bool = True
    """Keep the experts' inputs in FP8 for the backward: report 2.4.4, item 2."""
    activation_offload: float = 0.0
    """Part of the activations kept in host memory, item 3."""
    optimizer_offload: float = 0.0
    """Part of the optimizer's states kept in host memory."""
    modules: Modules = "transformer_engine"
    """Whose modules are planned: they keep different tensors."""
    has_overlap: bool = True
    """Expert all-to-all of one micro-batch under another's arithmetic, by one extra warm-up."""

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            UserError: naming the value and the nearest that can.
        """
        for name in ("activation_offload", "optimizer_offload"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: a fraction from 0 to 1 is expected")
        if self.lora_rank < 0:
            raise UserError(
                f"lora_rank={self.lora_rank}: a rank from 1, or 0 for none, is expected"
            )
        if self.lora_base_fp8 and (self.fp8_storage or not self.lora_rank):
            raise UserError(
                "lora_base_fp8: needs lora_rank, and no fp8_storage, which decides what backward "
                "keeps of the same products"
            )
        if self.document_tokens < 0 or (self.document_tokens and self.micro_batch_size > 1):
            raise UserError(
                f"document_tokens={self.document_tokens}, micro_batch_size="
                f"{self.micro_batch_size}: a length from 0, and one pack at a time, are expected"
            )
        unknown = self.recompute - set(get_args(Recompute))
        if unknown:
            known = ", ".join(get_args(Recompute))
            raise UserError(f"recompute: {', '.join(sorted(unknown))} is not one of {known}")
        if self.modules == "local" and "mla_up" in self.recompute:
            raise UserError(
                "recompute mla_up with local modules frees nothing: their attention keeps copies "
                "of queries, keys and values; leave it out, or plan for transformer_engine"
            )
        if self.modules == "local" and self.activation_offload:
            raise UserError(
                "activation offload with local modules: Megatron's is for Transformer Engine's; "
                "leave it out, or plan for transformer_engine"
            )
        load = Workload(
            self.preset.num_layers,
            self.preset.num_attention_heads,
            self.preset.num_moe_experts,
            self.seq_length,
            self.sequences_per_step,
            self.micro_batch_size,
        )
        check_layout(self, load)
        if self.world_size > GPUS_PER_NODE and self.world_size % GPUS_PER_NODE:
            raise UserError(
                f"world size {self.world_size} is not a multiple of {GPUS_PER_NODE} GPUs per node"
            )
        if self.vpp > 1 and self.num_microbatches % self.pp:
            raise UserError(
                f"{self.num_microbatches} micro-batches a step do not divide by PP={self.pp}, "
                "which virtual stages need; change the batch, the layout, or --vpp 1"
            )
        self.chunks()

    @property
    @override
    def is_split_by_hand(self) -> bool:
        """Always: ``chunks`` places the layers."""
        return True

    def chunks(self) -> tuple[Chunk, ...]:
        """The layers of every model chunk, in the order a token passes through them."""
        return split_into_chunks(self.preset.num_layers, self.pp, self.vpp)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that pass through one pipeline in a step."""
        return self.sequences_per_step // (self.data_parallel * self.micro_batch_size)

    @property
    def attended_length(self) -> int:
        """Tokens of the causal square that attention works on."""
        return min(self.document_tokens or self.seq_length, self.seq_length)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step, over all replicas."""
        return self.sequences_per_step * self.seq_length

    @property
    def tokens_per_microbatch(self) -> int:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.seq_length // self.cp

    def replace(self, **changes: object) -> "RunRequest":
        """A copy in which the fields of ``changes`` have those values."""
        return replace(self, **changes)  # type: ignore[arg-type]
