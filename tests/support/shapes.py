"""The shape that tests compute with: every feature of K2, as small as it goes."""

from dataclasses import replace

from megatron_k2.presets import K2_TINY, YarnScaling

SMALL = replace(
    K2_TINY,
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_head_dim=16,
    qk_pos_emb_head_dim=8,
    v_head_dim=12,
    num_moe_experts=8,
    moe_router_topk=3,
    moe_ffn_hidden_size=20,
    vocab_size=96,
    yarn=YarnScaling(8.0, 32, 1.0, 1.0, 1.0, 1.0),
)
