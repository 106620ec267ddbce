"""Seconds that a replica takes to read prompts and to draw a token for every answer.

A decode step reads every weight that some token needs and all latents held: memory's rate bounds
it, arithmetic where many answers hold much. Beside that each layer with experts sends tokens to
their GPUs and back, which is taken as not hidden, and costs a latency of its own. Attention works
on latents (absorbed). A model, not a measurement: rates are data sheets times ``Assumptions``.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_k2.planning.cost.flops import model_flops_per_token
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.planning.estimate import Assumptions
from megatron_k2.planning.gpus import GPUS_PER_NODE, Gpu
from megatron_k2.planning.rl.memory import EngineWeights, engine_weights, latent_bytes
from megatron_k2.planning.rl.request import EngineLayout
from megatron_k2.presets import ModelPreset

LAYER_SECONDS = 60e-6
"""A layer's launches and the latencies of its two all-to-alls, in a decode step. Assumption."""


@dataclass(frozen=True)
class Replica:
    """One replica's rates."""

    preset: ModelPreset
    gpu: Gpu
    engines: EngineLayout
    weights: EngineWeights
    assumptions: Assumptions

    def step_seconds(self, answers: float, held_tokens: float) -> float:
        """A token for each of ``answers`` that hold ``held_tokens`` together.

        Linear in what is held, so that many steps take the mean of the first and the last.
        """
        read = self.read_seconds(answers, held_tokens)
        products = self.flops_seconds(answers, held_tokens)
        latencies = self.preset.num_layers * LAYER_SECONDS
        return max(read, products) + self.sent_seconds(answers) + latencies

    def read_seconds(self, answers: float, held_tokens: float) -> float:
        """Of weights and latents, from the GPU's memory."""
        p, e = self.preset, self.engines
        hit = 1 - (1 - p.moe_router_topk / p.num_moe_experts) ** answers
        weights = self.weights.whole + hit * self.weights.experts
        latents = held_tokens / e.groups * latent_bytes(p)
        return (weights + latents) / (self.gpu.hbm_gb_per_s * 1e9 * self.assumptions.hbm)

    def flops_seconds(self, answers: float, held_tokens: float) -> float:
        """Of the products: all linears, and attention over latents, in bf16."""
        p, e, a = self.preset, self.engines, self.assumptions
        linears = 2.0 * answers * self._activated
        width = 2 * p.kv_lora_rank + p.qk_pos_emb_head_dim
        attention = 2.0 * held_tokens * p.num_layers * p.num_attention_heads * width
        seconds = linears / (self._tflops * a.grouped) + attention / (
            self.gpu.bf16_tflops * a.attention
        )
        return seconds / 1e12 / max(1, e.gpus)

    def sent_seconds(self, tokens: float) -> float:
        """Of tokens to their experts and back: a copy for each expert, all but a share away."""
        p, e = self.preset, self.engines
        copies = tokens / max(1, e.gpus) * p.moe_router_topk * p.hidden_size
        there = 1 if e.is_fp8 else 2
        away = (there + 2) * copies * (1 - 1 / max(1, e.gpus))
        return p.num_moe_layers * away / self._link

    def prompt_seconds(self, tokens: float, length: float) -> float:
        """Reading ``tokens`` of texts of ``length``, by all GPUs of the replica."""
        fixed, by_length = self._forward
        flops = tokens * (fixed + by_length * length)
        rate = self._tflops * 1e12 * self.assumptions.grouped * max(1, self.engines.gpus)
        return flops / rate + self.sent_seconds(tokens)

    @cached_property
    def _forward(self) -> tuple[float, float]:
        """FLOPs of a token's forward: whatever the length, and for each token of it."""
        short, long = (model_flops_per_token(self.preset, length) / 3 for length in (1024, 2048))
        slope = (long - short) / 1024
        return short - 1024 * slope, slope

    @cached_property
    def _activated(self) -> int:
        """Weights that a token passes through."""
        return count_parameters(self.preset).activated

    @property
    def _tflops(self) -> float:
        return self.gpu.fp8_tflops if self.engines.is_fp8 else self.gpu.bf16_tflops

    @property
    def _link(self) -> float:
        """Bytes a second of a GPU to the others of its replica."""
        if self.engines.gpus <= GPUS_PER_NODE:
            return self.gpu.nvlink_gb_per_s * 1e9 * self.assumptions.part("nvlink")
        return self.gpu.network_gb_per_s * 1e9 * self.assumptions.network


def replica(p: ModelPreset, gpu: Gpu, engines: EngineLayout, a: Assumptions) -> Replica:
    """The rates of ``engines`` on ``gpu``."""
    return Replica(p, gpu, engines, engine_weights(p, engines), a)
