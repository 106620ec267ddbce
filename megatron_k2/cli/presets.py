"""``megatron-k2 presets``: the published shapes and their exact parameter counts."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from megatron_k2.presets import ModelPreset


def description(preset: "ModelPreset") -> dict[str, Any]:
    """Everything printed on ``preset``: shape, source and counts in elements."""
    from megatron_k2.planning.cost.params import count_parameters

    count = count_parameters(preset)
    return {
        "name": preset.name,
        "source": preset.source,
        "parameters": {
            "total": count.total,
            "trainable": count.trainable,
            "router_biases": count.router_biases,
            "activated": count.activated,
            "activated_with_embedding": count.activated_with_embedding,
        },
        "shape": {
            "num_layers": preset.num_layers,
            "num_dense_layers": preset.num_dense_layers,
            "hidden_size": preset.hidden_size,
            "ffn_hidden_size": preset.ffn_hidden_size,
            "num_attention_heads": preset.num_attention_heads,
            "q_lora_rank": preset.q_lora_rank,
            "kv_lora_rank": preset.kv_lora_rank,
            "qk_head_dim": preset.qk_head_dim,
            "qk_pos_emb_head_dim": preset.qk_pos_emb_head_dim,
            "v_head_dim": preset.v_head_dim,
            "num_moe_experts": preset.num_moe_experts,
            "moe_router_topk": preset.moe_router_topk,
            "num_shared_experts": preset.num_shared_experts,
            "moe_ffn_hidden_size": preset.moe_ffn_hidden_size,
            "vocab_size": preset.vocab_size,
            "max_position_embeddings": preset.max_position_embeddings,
        },
        "training": {
            "seq_length": preset.training.seq_length,
            "global_batch_size": preset.training.global_batch_size,
            "train_samples": preset.training.train_samples,
            "lr": preset.training.lr,
            "qk_clip_threshold": preset.training.qk_clip_threshold,
        },
    }


def shown(preset: "ModelPreset") -> "list[RenderableType]":
    """One preset as a few lines for a terminal."""
    from megatron_k2.terminal import pairs

    facts = description(preset)
    counts, shape, training = facts["parameters"], facts["shape"], facts["training"]
    tokens = training["train_samples"] * training["seq_length"]
    latent = "none" if shape["q_lora_rank"] is None else shape["q_lora_rank"]
    rows = [
        ("source", facts["source"]),
        ("layers", f"{shape['num_layers']}, the first {shape['num_dense_layers']} dense"),
        ("width", f"hidden {shape['hidden_size']}, dense SwiGLU {shape['ffn_hidden_size']}"),
        (
            "attention",
            f"{shape['num_attention_heads']} heads; query latent {latent}, key/value latent "
            f"{shape['kv_lora_rank']}; head {shape['qk_head_dim']} + "
            f"{shape['qk_pos_emb_head_dim']} rotary, value {shape['v_head_dim']}",
        ),
        (
            "experts",
            f"{shape['moe_router_topk']} of {shape['num_moe_experts']} and "
            f"{shape['num_shared_experts']} shared, SwiGLU {shape['moe_ffn_hidden_size']}",
        ),
        ("vocabulary", f"{shape['vocab_size']:,}"),
        ("context", f"{shape['max_position_embeddings']:,}"),
        (
            "training",
            f"{tokens:,} tokens in {training['global_batch_size']:,} x {training['seq_length']:,} "
            f"a step; lr {training['lr']:g}; τ {training['qk_clip_threshold']:g}",
        ),
    ]
    numbers = [
        ("total", f"{counts['total']:,}"),
        ("trainable", f"{counts['trainable']:,}"),
        ("router biases", f"{counts['router_biases']:,}"),
        ("activated a token", f"{counts['activated']:,}"),
        ("with input embedding", f"{counts['activated_with_embedding']:,}"),
    ]
    return [preset.name, pairs(rows), "  parameters", pairs(numbers, indent=4, has_numbers=True)]


def main(argv: list[str]) -> int:
    """Print one preset, or all of them."""
    from megatron_k2.presets import PRESETS, get_preset
    from megatron_k2.terminal import show

    parser = argparse.ArgumentParser(
        prog="megatron-k2 presets",
        description="Published model shapes with exact parameter counts. A token is activated "
        "through the output head but only looks its input embedding up, so both sums are given.",
    )
    parser.add_argument("name", nargs="?", help="one of: " + ", ".join(PRESETS))
    parser.add_argument("--json", action="store_true", help="machine-readable")
    arguments = parser.parse_args(argv)
    presets = [get_preset(arguments.name)] if arguments.name else list(PRESETS.values())
    if arguments.json:
        print(json.dumps([description(preset) for preset in presets], indent=2))
    else:
        for preset in presets:
            show(*shown(preset), "")
        print("Train one with: megatron-k2 pretrain --preset NAME --data DIR --save DIR")
    return 0
