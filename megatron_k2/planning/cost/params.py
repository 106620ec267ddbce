"""Closed-form parameter counts of a preset.

Counted are weights only: what the optimizer trains (``trainable``), and beside it the router's
selection biases, which are buffers moved by the balance rule and not by a gradient.
"""

from dataclasses import dataclass

from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one model, in elements."""

    embedding: int
    """Input embedding; the output head has as many."""
    attention_per_layer: int
    """MLA matrices and the two latent norms."""
    norms_per_layer: int
    """The two RMSNorms around attention and FFN."""
    dense_ffn: int
    """SwiGLU of one leading dense layer."""
    expert: int
    """SwiGLU of one routed expert."""
    shared_experts: int
    """SwiGLU of one layer's shared experts together."""
    router: int
    """Router matrix of one layer."""
    trainable: int
    router_biases: int
    activated: int
    """Weights one token passes through: all but the experts not chosen, output head included,
    input embedding not (it is a look-up)."""
    activated_with_embedding: int

    @property
    def total(self) -> int:
        """Trainable weights and router biases."""
        return self.trainable + self.router_biases


def _attention(p: ModelPreset) -> int:
    query_width = p.num_attention_heads * (p.qk_head_dim + p.qk_pos_emb_head_dim)
    if p.q_lora_rank is None:
        query = p.hidden_size * query_width
    else:
        query = p.hidden_size * p.q_lora_rank + p.q_lora_rank + p.q_lora_rank * query_width
    kv_down = p.hidden_size * (p.kv_lora_rank + p.qk_pos_emb_head_dim)
    kv_up = p.kv_lora_rank * p.num_attention_heads * (p.qk_head_dim + p.v_head_dim)
    output = p.num_attention_heads * p.v_head_dim * p.hidden_size
    return query + kv_down + p.kv_lora_rank + kv_up + output


def count_parameters(p: ModelPreset) -> ParameterCount:
    """Every parameter of ``p``, by formula; equal to a built model's (tested)."""
    embedding = p.vocab_size * p.hidden_size
    attention = _attention(p)
    norms = 2 * p.hidden_size
    dense_ffn = 3 * p.hidden_size * p.ffn_hidden_size
    expert = 3 * p.hidden_size * p.moe_ffn_hidden_size
    shared = 3 * p.hidden_size * p.moe_shared_expert_intermediate_size
    router = p.num_moe_experts * p.hidden_size

    outside_routed = (
        p.num_layers * (attention + norms)
        + p.num_dense_layers * dense_ffn
        + p.num_moe_layers * (shared + router)
        + p.hidden_size  # final norm
    )
    trainable = 2 * embedding + outside_routed + p.num_moe_layers * p.num_moe_experts * expert
    activated = embedding + outside_routed + p.num_moe_layers * p.moe_router_topk * expert
    return ParameterCount(
        embedding=embedding,
        attention_per_layer=attention,
        norms_per_layer=norms,
        dense_ffn=dense_ffn,
        expert=expert,
        shared_experts=shared,
        router=router,
        trainable=trainable,
        router_biases=p.num_moe_layers * p.num_moe_experts,
        activated=activated,
        activated_with_embedding=activated + embedding,
    )
