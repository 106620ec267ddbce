"""Make real Megatron checkpoints of one tiny random model in several layouts: two gloo ranks.

``python -m tests.checkpoint.build_checkpoints JSON``, where JSON is the path OUT, writes
``OUT/<layout>/iter_0000010`` for each layout, the same
weights in all (every layout but the first loads the first through Megatron's own resharding), and
``OUT/state.pt`` (whole state dict) and ``OUT/logits_<rotary>.pt`` (reference for verify-logits).
"""

import functools
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_k2.presets import ModelPreset, TrainingDefaults, YarnScaling

TINY = ModelPreset(
    name="k2-tiny",
    source="test",
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_head_dim=12,
    qk_pos_emb_head_dim=8,
    v_head_dim=10,
    num_dense_layers=1,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=20,
    num_shared_experts=1,
    moe_router_topk_scaling_factor=2.827,
    vocab_size=61,
    bos_token_id=0,
    eos_token_id=1,
    max_position_embeddings=256,
    norm_epsilon=1e-6,
    yarn=YarnScaling(16.0, 16, 1.0, 1.0, 1.0, 1.0),
    training=TrainingDefaults(32, 1, 1, 1, 1e-3, 1e-4, 1, 1, 1),
)
PADDED_VOCAB = 64
ITERATION = 10

VPP2_LAYERS = "Et|t|t|L"
"""Of two pipeline ranks with two virtual stages each."""

LAYOUTS = {
    "replicated": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def saved_args(rotary: str) -> Namespace:
    """The arguments a run of TINY (which k2-tiny's flags overrode) would save."""
    names = """num_layers hidden_size ffn_hidden_size num_attention_heads q_lora_rank kv_lora_rank
        qk_head_dim qk_pos_emb_head_dim v_head_dim moe_router_topk moe_ffn_hidden_size
        moe_shared_expert_intermediate_size moe_router_topk_scaling_factor""".split()
    return Namespace(
        **{name: getattr(TINY, name) for name in names},
        preset="k2-tiny",
        num_experts=TINY.num_moe_experts,
        layernorm_epsilon=TINY.norm_epsilon,
        moe_layer_freq=[0, 1, 1],
        tokenizer_type="NullTokenizer",
        vocab_size=TINY.vocab_size,
        padded_vocab_size=PADDED_VOCAB,
        rope_type=rotary,
        rotary_base=50000,
        rotary_scaling_factor=TINY.yarn.rotary_scaling_factor if rotary == "yarn" else 1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
        yarn_mla_beta_fast=1.0,
        yarn_mla_beta_slow=1.0,
        yarn_mla_original_max_position_embeddings=16,
        max_position_embeddings=32,
        seq_length=32,
        consumed_train_samples=7,
    )


def build_model(
    rotary: str = "rope", lora: Any = None, vp_stage: int | None = None, **layout: int
) -> torch.nn.Module:
    """This rank's part of TINY, or one virtual stage of it; with adapters by their settings."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_k2.model.lora.model import AdapterGPTModel
    from megatron_k2.model.spec import decoder_block_spec

    p = TINY
    same = """num_layers hidden_size ffn_hidden_size num_attention_heads q_lora_rank kv_lora_rank
        qk_head_dim qk_pos_emb_head_dim v_head_dim moe_router_topk moe_ffn_hidden_size
        num_moe_experts moe_shared_expert_intermediate_size
        moe_router_topk_scaling_factor""".split()
    config = MLATransformerConfig(
        **{name: getattr(p, name) for name in same},
        **layout,
        pipeline_model_parallel_layout=None if vp_stage is None else VPP2_LAYERS,
        sequence_parallel=layout.get("tensor_model_parallel_size", 1) > 1,
        expert_tensor_parallel_size=1,
        moe_layer_freq=[0, 1, 1],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        layernorm_epsilon=p.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        multi_latent_attention=True,
        rope_type=rotary,
        rotary_base=p.rotary_base,
        rotary_scaling_factor=p.yarn.rotary_scaling_factor if rotary == "yarn" else 1.0,
        original_max_position_embeddings=p.yarn.original_max_position_embeddings,
        beta_fast=p.yarn.beta_fast,
        beta_slow=p.yarn.beta_slow,
        mscale=p.yarn.mscale,
        mscale_all_dim=p.yarn.mscale_all_dim,
        transformer_impl="local",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
    )
    if vp_stage is None and config.pipeline_model_parallel_size > 1:
        config.num_layers_in_first_pipeline_stage = 2
    kind = GPTModel if lora is None else functools.partial(AdapterGPTModel, lora)
    return kind(
        config,
        decoder_block_spec(config, vp_stage, lora=lora),
        vocab_size=PADDED_VOCAB,
        max_sequence_length=32,
        pre_process=parallel_state.is_pipeline_first_stage(vp_stage is None, vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(vp_stage is None, vp_stage),
        vp_stage=vp_stage,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=int(p.rotary_base),
    ).eval()


def _randomise(model: torch.nn.Module) -> None:
    """Away from initial values that would hide a mistake: norms of 1, biases of 0."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)


def _described(stages: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """As Megatron saves one stage, or several virtual ones."""
    if len(stages) == 1:
        return {"model": stages[0].sharded_state_dict()}
    return {f"model{i}": stage.sharded_state_dict() for i, stage in enumerate(stages)}


def save(stages: Sequence[torch.nn.Module], directory: Path, rotary: str, **more: Any) -> None:
    """With ``more`` among the saved arguments."""
    from megatron.core import dist_checkpointing

    target = directory / f"iter_{ITERATION:07d}"
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    dist.barrier()
    moment = dist_checkpointing.ShardedTensor.from_rank_offsets(
        "optimizer.state.exp_avg.decoder.final_layernorm.weight",
        torch.ones(TINY.hidden_size),
        replica_id=dist.get_rank(),
    )
    state = {**_described(stages), "optimizer": {"step": 3, "exp_avg": moment}}
    args = Namespace(**vars(saved_args(rotary)), **more)
    state |= {"args": args, "iteration": ITERATION, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(target))


def load(stages: Sequence[torch.nn.Module], directory: Path) -> None:
    from megatron.core import dist_checkpointing

    state = _described(stages)
    loaded = dist_checkpointing.load(state, str(directory / f"iter_{ITERATION:07d}"))
    for name, stage in zip(state, stages, strict=True):
        stage.load_state_dict(loaded[name], strict=False)


def _reference_logits(state: dict[str, torch.Tensor], rotary: str, path: Path) -> None:

    model = build_model(rotary)
    model.load_state_dict(state, strict=False)
    tokens = torch.randint(0, TINY.vocab_size, (2, 24), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(24).expand(2, -1)
    with torch.no_grad():
        logits = model(tokens, positions, None)
    if dist.get_rank() == 0:
        torch.save({"tokens": tokens, "logits": logits.float()}, path)


def main(out: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_k2.host.cpu import cpu_host

    dist.init_process_group("gloo")
    with cpu_host():
        for name, layout in LAYOUTS.items():
            parallel_state.initialize_model_parallel(**layout, expert_tensor_parallel_size=1)
            model_parallel_cuda_manual_seed(1)
            model = build_model(**layout)
            if layout:
                load([model], out / "replicated")
            else:
                _randomise(model)
                state = {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}
                if dist.get_rank() == 0:
                    torch.save(state, out / "state.pt")
                for rotary in ("rope", "yarn"):
                    _reference_logits(state, rotary, out / f"logits_{rotary}.pt")
            save([model], out / name, "yarn" if name == "tp2" else "rope")
            parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(json.loads(Path(sys.argv[1]).read_text())))
