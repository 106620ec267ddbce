"""A recipe of reinforcement learning as overrides of a NeMo-RL configuration; not one run of it.

Keys are those of NeMo-RL v0.7.0 (its ``grpo_math_1B.yaml``, on which this builds), as
recorded on 2026-11-27; NeMo-RL is neither a dependency nor tried here. Layout, batch, lengths and
engines go over. What has no key there stays behind and is said in the file: this package's
objective, MuonClip, partial rollouts, task sets, offload of activations.
"""

import json
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.flags.layout import RECOMPUTE_MODULES
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.rl_engines import engines_of, rl_nodes
from megatron_k2.launch.rl_plan import rl_request
from megatron_k2.launch.stage import ReinforcementLearning
from megatron_k2.launch.task_data import TaskData
from megatron_k2.planning.gpus import GPUS_PER_NODE
from megatron_k2.planning.rl.memory import held

VERSION = "v0.7.0"
HEAD = """\
# {name} as overrides of NeMo-RL {version}, whose grpo_math_1B.yaml it begins from.
# Keys as recorded from that version; nothing of this was run. What has no key there: the K2
# objective (its own is GRPO's), MuonClip with QK-Clip (Adam here), partial rollouts, task sets and
# judges (data and env are the default's, to be replaced), offload of activations.
"""


def nemo_rl_yaml(recipe: Recipe, save: str) -> str:
    """The file's text.

    Args:
        recipe: one with engines on GPUs.
        save: the run's directory.

    Raises:
        UserError: another recipe.
    """
    stage, data = recipe.stage, recipe.data
    if recipe.is_cpu or not isinstance(stage, ReinforcementLearning):
        raise UserError(f"{recipe.name}: NeMo-RL takes a recipe of RL on GPUs, ..._rl_<N>gpu_<hw>")
    assert isinstance(data, TaskData)
    values = {
        "defaults": "grpo_math_1B.yaml",
        "grpo": {
            "num_prompts_per_step": stage.prompts(recipe.phase),
            "num_generations_per_prompt": stage.group_size,
            "max_num_steps": recipe.phase.steps // stage.mini_batches,
            "normalize_rewards": False,
            "use_leave_one_out_baseline": False,
            "async_grpo": {"enabled": False},
        },
        "loss_fn": {"reference_policy_kl_penalty": 0.0},
        "checkpointing": {"checkpoint_dir": save, "save_period": recipe.checkpoint.interval},
        "policy": _policy(recipe, f"{data.root}/{data.model}"),
        "cluster": {"gpus_per_node": GPUS_PER_NODE, "num_nodes": sum(rl_nodes(recipe))},
    }
    return HEAD.format(name=recipe.name, version=VERSION) + "\n".join(_lines(values)) + "\n"


def _policy(recipe: Recipe, model: str) -> dict[str, Any]:
    phase, e = recipe.phase, engines_of(recipe)
    part = float(f"{held(rl_request(recipe)).memory_part:.2f}")
    apart = {"resources": {"gpus_per_node": e.gpus_per_node, "num_nodes": e.nodes}}
    return {
        "model_name": model,
        "train_global_batch_size": phase.sequences_per_step,
        "train_micro_batch_size": recipe.layout.micro_batch_size,
        "max_total_sequence_length": phase.seq_length,
        "precision": "bfloat16",
        "make_sequence_length_divisible_by": recipe.layout.tp * 2 * recipe.layout.cp,
        "dtensor_cfg": {"enabled": False},
        "megatron_cfg": _megatron(recipe),
        "sequence_packing": {"enabled": True},
        "generation": {
            "backend": "vllm",
            "colocated": {"enabled": e.is_colocated, **({} if e.is_colocated else apart)},
            "vllm_cfg": {
                "async_engine": True,
                "tensor_parallel_size": e.tp,
                "expert_parallel_size": e.gpus,
                "gpu_memory_utilization": part,
            },
        },
    }


def _megatron(recipe: Recipe) -> dict[str, Any]:
    r, phase, weight_decay = recipe.layout, recipe.phase, recipe.preset.training.weight_decay
    stages = [chunk.layers for chunk in r.chunks()]
    names = [RECOMPUTE_MODULES[name] for name in RECOMPUTE_MODULES if name in r.recompute]
    uneven = {
        "num_layers_in_first_pipeline_stage": len(stages[0]),
        "num_layers_in_last_pipeline_stage": len(stages[-1]),
    }
    return {
        "enabled": True,
        "activation_checkpointing": bool(names),
        "recompute_granularity": "selective",
        "recompute_modules": names,
        "tensor_model_parallel_size": r.tp,
        "pipeline_model_parallel_size": r.pp,
        **(uneven if r.pp > 1 else {}),
        "context_parallel_size": r.cp,
        "expert_model_parallel_size": r.ep,
        "expert_tensor_parallel_size": r.etp,
        "sequence_parallel": r.is_sequence_parallel,
        "freeze_moe_router": False,
        "moe_router_load_balancing_type": "none",
        "moe_router_bias_update_rate": 0.0,
        "optimizer": {
            "optimizer": "adam",
            "lr": phase.lr,
            "min_lr": phase.min_lr,
            "weight_decay": weight_decay,
            "optimizer_cpu_offload": bool(r.optimizer_offload),
            "optimizer_offload_fraction": r.optimizer_offload,
        },
        "scheduler": {"lr_decay_style": phase.shape},
    }


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    """Nested mappings as YAML; a scalar or a list as JSON, which YAML reads."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}")
    return lines


def _scalar(value: object) -> str:
    """``1e-06`` has no point, and YAML 1.1 would read it as text."""
    text = json.dumps(value)
    is_bare = isinstance(value, float) and "e" in text and "." not in text
    return text.replace("e", ".0e", 1) if is_bare else text
