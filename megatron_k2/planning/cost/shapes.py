"""Shapes of the weights one rank holds, by arithmetic: no model is built."""

from dataclasses import dataclass

from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class Weight:
    """One parameter of a rank."""

    shape: tuple[int, ...]
    is_expert: bool = False


def _attention(p: ModelPreset, tp: int) -> list[Weight]:
    """Norm before, projections, the latent norms, in the order of Megatron's modules."""
    heads = p.num_attention_heads // tp
    query_rows = heads * (p.qk_head_dim + p.qk_pos_emb_head_dim)
    found = [Weight((p.hidden_size,)), Weight((p.hidden_size, heads * p.v_head_dim))]
    if p.q_lora_rank is None:
        found.append(Weight((query_rows, p.hidden_size)))
    else:
        found.append(Weight((p.q_lora_rank, p.hidden_size)))
        found.append(Weight((query_rows, p.q_lora_rank)))
    found.append(Weight((p.kv_lora_rank + p.qk_pos_emb_head_dim, p.hidden_size)))
    found.append(Weight((heads * (p.qk_head_dim + p.v_head_dim), p.kv_lora_rank)))
    if p.q_lora_rank is not None:
        found.append(Weight((p.q_lora_rank,)))
    return [*found, Weight((p.kv_lora_rank,))]


def _swiglu(hidden: int, width: int, *, is_expert: bool = False) -> list[Weight]:
    return [Weight((2 * width, hidden), is_expert), Weight((hidden, width), is_expert)]


def rank_weights(
    p: ModelPreset, layers: range, *, tp: int, ep: int, has_embedding: bool, has_head: bool
) -> list[Weight]:
    """Every weight of a rank, in the order of Megatron's modules (tested against a built model).

    Args:
        p: the model.
        layers: of this pipeline stage.
        tp: tensor-parallel ranks; experts are whole (expert tensor parallelism 1).
        ep: expert-parallel ranks.
        has_embedding: first stage.
        has_head: last stage: final norm and output head.
    """
    vocabulary = Weight((p.vocab_size // tp, p.hidden_size))
    found = [vocabulary] if has_embedding else []
    for layer in layers:
        found += [*_attention(p, tp), Weight((p.hidden_size,))]
        if layer < p.num_dense_layers:
            found += _swiglu(p.hidden_size, p.ffn_hidden_size // tp)
            continue
        found.append(Weight((p.num_moe_experts, p.hidden_size)))
        for _ in range(p.num_moe_experts // ep):
            found += _swiglu(p.hidden_size, p.moe_ffn_hidden_size, is_expert=True)
        found += _swiglu(p.hidden_size, p.moe_shared_expert_intermediate_size // tp)
    return [*found, Weight((p.hidden_size,)), vocabulary] if has_head else found
