"""vLLM's and SGLang's loaders, as data: every exported tensor finds a parameter, and fills it.

Read from ``load_weights`` of vllm/model_executor/models/deepseek_v2.py (002d6073) and
sglang/srt/models/deepseek_v2.py (00114aef). Both pass over ``rotary_emb.inv_freq``, fuse gate with
up and q_a with kv_a themselves, and take experts one by one; other names raise KeyError there.
"""

import dataclasses
import re

import pytest

from megatron_k2.checkpoint.hf.audit import released_tensors
from megatron_k2.presets import K2_TINY, KIMI_K2, MOONLIGHT_16B_A3B

Q_A = {"vllm": "fused_qkv_a_proj", "sglang": "fused_qkv_a_proj_with_mqa"}

K2_TWO_LAYERS = dataclasses.replace(KIMI_K2, num_layers=2)
MOONLIGHT_TWO_LAYERS = dataclasses.replace(MOONLIGHT_16B_A3B, num_layers=2)
PRESETS = [K2_TWO_LAYERS, MOONLIGHT_TWO_LAYERS, K2_TINY]


def destination(engine, name, has_q_lora):
    """Parameter and shard that the engine's loader puts a tensor into; None: passed over."""
    if "rotary_emb.inv_freq" in name:
        return None
    expert = re.search(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.", name)
    if expert:
        stack = "w2_" if expert[2] == "down" else "w13_"
        shard = {"gate": "w1", "up": "w3", "down": "w2"}[expert[2]]
        return name.replace(expert[0], f"mlp.experts.{stack}"), (int(expert[1]), shard)
    for i, half in enumerate(("gate_proj", "up_proj")):
        if half in name:
            return name.replace(half, "gate_up_proj"), i
    if has_q_lora:
        for i, half in enumerate(("q_a_proj", "kv_a_proj_with_mqa")):
            if half in name:
                return name.replace(half, Q_A[engine]), i
    return name, None


def parameters(engine, p):
    """Of the engine's model: name -> shards it waits for and rows all together."""
    heads, blocks = p.num_attention_heads, lambda n: -(-n // 128)
    attention = {
        "kv_b_proj": heads * (p.qk_head_dim + p.v_head_dim),
        "o_proj": p.hidden_size,
    }
    shards = {}
    if p.q_lora_rank is None:
        attention |= {
            "q_proj": heads * (p.qk_head_dim + p.qk_pos_emb_head_dim),
            "kv_a_proj_with_mqa": p.kv_lora_rank + p.qk_pos_emb_head_dim,
        }
    else:
        attention["q_b_proj"] = heads * (p.qk_head_dim + p.qk_pos_emb_head_dim)
        shards[Q_A[engine]] = (p.q_lora_rank, p.kv_lora_rank + p.qk_pos_emb_head_dim)
    plain = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected = {name: {None} for name in plain}
    rows = {}
    for layer in range(p.num_layers):
        at = f"model.layers.{layer}."
        latent = ["kv_a_layernorm"] + (["q_a_layernorm"] if p.q_lora_rank else [])
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += [f"self_attn.{name}" for name in latent]
        expected |= {f"{at}{name}.weight": {None} for name in norms}
        widths = {f"self_attn.{k}": (n,) for k, n in (attention).items()}
        widths |= {f"self_attn.{k}": n for k, n in shards.items()}
        if layer < p.num_dense_layers:
            widths |= {"mlp.gate_up_proj": (p.ffn_hidden_size,) * 2}
            widths |= {"mlp.down_proj": (p.hidden_size,)}
        else:
            width = p.moe_shared_expert_intermediate_size
            widths |= {"mlp.shared_experts.gate_up_proj": (width,) * 2}
            widths |= {"mlp.shared_experts.down_proj": (p.hidden_size,)}
            for name in ("weight", "e_score_correction_bias"):
                expected[f"{at}mlp.gate.{name}"] = {None}
            every = range(p.num_moe_experts)
            for suffix in ("weight", "weight_scale_inv"):
                both = {(e, half) for e in every for half in ("w1", "w3")}
                expected[f"{at}mlp.experts.w13_{suffix}"] = both
                expected[f"{at}mlp.experts.w2_{suffix}"] = {(e, "w2") for e in every}
        for name, parts in widths.items():
            for suffix, count in (("weight", lambda n: n), ("weight_scale_inv", blocks)):
                numbered = range(len(parts)) if len(parts) > 1 else [None]
                expected[f"{at}{name}.{suffix}"] = set(numbered)
                rows[f"{at}{name}.{suffix}"] = sum(map(count, parts))
    return expected, rows


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_every_released_tensor_fills_a_parameter_of_the_engine(engine, preset):
    found, num_rows = {}, {}
    for name, tensor in released_tensors(preset).items():
        place = destination(engine, name, preset.q_lora_rank is not None)
        if place is None:
            continue
        parameter, shard = place
        assert shard not in found.setdefault(parameter, set()), name
        found[parameter].add(shard)
        num_rows[parameter] = num_rows.get(parameter, 0) + tensor.shape[0]
    expected, rows = parameters(engine, preset)
    assert found == expected
    assert {name: num_rows[name] for name in rows} == rows


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.self_attn.kv_proj.weight"],
    ids=["experts fused as transformers 5 has them in memory", "a name of our own"],
)
def test_other_names_would_find_no_parameter(name):
    parameter, _ = destination("vllm", name, has_q_lora=True)
    assert parameter not in parameters("vllm", K2_TINY)[0]
