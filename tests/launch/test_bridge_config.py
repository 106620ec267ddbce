"""A recipe as Megatron-Bridge's config, field by field against the recipe's own flags.

Needs Megatron-Bridge 0.6.2 in the environment (docs/compatibility.md). Transformer Engine is not
needed: the one import of it that Bridge leaves unguarded is answered, as in the benchmarks.
"""

import importlib.util
import sys

import pytest

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import last_value
from megatron_k2.launch.bridge_config import to_bridge_config
from megatron_k2.launch.overrides import apply
from megatron_k2.launch.policies import ExpertDispatch
from megatron_k2.recipes import get_recipe

HAS_BRIDGE = (
    importlib.util.find_spec("megatron") is not None
    and importlib.util.find_spec("megatron.bridge") is not None
)
with_bridge = pytest.mark.skipif(not HAS_BRIDGE, reason="megatron-bridge is not installed")

FIELDS = {
    "--num-layers": "model.transformer.num_layers",
    "--hidden-size": "model.transformer.hidden_size",
    "--kv-lora-rank": "model.transformer.kv_lora_rank",
    "--num-experts": "model.transformer.num_moe_experts",
    "--moe-router-topk-scaling-factor": "model.transformer.moe_router_topk_scaling_factor",
    "--rotary-scaling-factor": "model.transformer.rotary_scaling_factor",
    "--yarn-mla-beta-fast": "model.transformer.beta_fast",
    "--yarn-mla-original-max-position-embeddings": (
        "model.transformer.original_max_position_embeddings"
    ),
    "--latent-norm-epsilon": "model.latent_norm_epsilon",
    "--tensor-model-parallel-size": "model.transformer.tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "model.transformer.pipeline_model_parallel_size",
    "--context-parallel-size": "model.transformer.context_parallel_size",
    "--expert-model-parallel-size": "model.transformer.expert_model_parallel_size",
    "--seq-length": "dataset.seq_length",
    "--micro-batch-size": "train.micro_batch_size",
    "--global-batch-size": "train.global_batch_size",
    "--train-samples": "train.train_samples",
    "--lr": "optimizer.lr",
    "--min-lr": "optimizer.min_lr",
    "--weight-decay": "optimizer.weight_decay",
    "--clip-grad": "optimizer.clip_grad",
    "--lr-decay-style": "scheduler.lr_decay_style",
    "--lr-decay-samples": "scheduler.lr_decay_samples",
    "--lr-warmup-samples": "scheduler.lr_warmup_samples",
    "--lr-wsd-decay-samples": "scheduler.lr_wsd_decay_samples",
    "--lr-wsd-decay-style": "scheduler.lr_wsd_decay_style",
    "--save-interval": "checkpoint.save_interval",
    "--save-retain-interval": "checkpoint.save_retain_interval",
    "--save": "checkpoint.save",
    "--pretrained-checkpoint": "checkpoint.pretrained_checkpoint",
    "--log-interval": "logger.log_interval",
    "--moe-token-dispatcher-type": "model.transformer.moe_token_dispatcher_type",
    "--moe-flex-dispatcher-backend": "model.transformer.moe_flex_dispatcher_backend",
    "--profile-step-start": "profiling.profile_step_start",
    "--profile-step-end": "profiling.profile_step_end",
    "--seed": "rng.seed",
}
"""Flag -> where Bridge has it; a flag that a recipe does not give is left out."""


@pytest.fixture(scope="module")
def _host():
    from benchmarks.bridge_peer import _import_without_transformer_engine
    from megatron_k2.host.cpu import megatron_host

    _import_without_transformer_engine()
    with megatron_host():
        yield


def _differing(config, flags):
    """Flags that Bridge's config has another value of, and how many were compared."""
    wrong, compared = [], 0
    for flag, path in FIELDS.items():
        if (given := last_value(flags, flag)) is None:
            continue
        found = config
        for name in path.split("."):
            found = getattr(found, name)
        compared += 1
        if str(found) != given and (isinstance(found, str) or float(found) != float(given)):
            wrong.append((flag, given, found))
    return wrong, compared


@with_bridge
@pytest.mark.slow
@pytest.mark.usefixtures("_host")
@pytest.mark.parametrize(
    "name", ["kimi_k2_pretrain_cpu", "kimi_k2_yarn_128k_cpu", "moonlight_16b_a3b_continue_cpu"]
)
def test_every_field_is_the_flags_and_bridge_accepts_it(name, tmp_path, monkeypatch):
    trace = ["profiler.tool=pytorch", "profiler.first_step=1", "profiler.last_step=2"]
    recipe = apply(get_recipe(name), trace)
    with pytest.warns(UserWarning, match="MuonClip has no place there, Megatron's muon"):
        config = to_bridge_config(recipe, "runs/x", str(tmp_path))
    flags = recipe.to_megatron_args("runs/x", str(tmp_path))
    wrong, compared = _differing(config, flags)
    assert wrong == []
    assert compared > 20
    other = apply(recipe, ["phase.lr=3e-3", "checkpoint.interval=1"])
    found, _ = _differing(config, other.to_megatron_args("runs/x", str(tmp_path)))
    assert {flag for flag, _, _ in found} == {"--lr", "--save-interval"}
    assert config.model.builder == "megatron_k2.model.build.K2ModelBuilder"
    monkeypatch.setenv("WORLD_SIZE", "1")
    config.validate()
    assert config.profiling.use_pytorch_profiler
    assert config.profiling.profile_ranks == [0]
    names, weights = config.dataset.blend_per_split[0]
    assert list(zip(names, weights, strict=True)) == [
        (f"{recipe.data.root}/{prefix}", weight)
        for prefix, weight in zip(recipe.data.prefixes, recipe.data.weights, strict=True)
    ]
    assert config.train.train_iters == recipe.steps
    assert config.scheduler.lr_decay_steps == recipe.steps * recipe.phase.sequences_per_step


@with_bridge
@pytest.mark.slow
@pytest.mark.usefixtures("_host")
@pytest.mark.filterwarnings("ignore:.*MuonClip has no place there.*adam")
def test_the_whole_layout_of_a_cluster_is_carried():
    """Without what Megatron refuses where Transformer Engine is absent: no size's."""
    recipe = get_recipe("kimi_k2_long_32k_256gpu_h800")
    memory = {"recompute": frozenset(), "fp8_storage": False, "activation_offload": 0.0}
    layout = recipe.layout.replace(**memory, has_overlap=False)
    flex = ExpertDispatch("flex", "hybridep")
    local = ("--transformer-impl", "local")
    recipe = recipe.replace(layout=layout, dispatch=flex, extra_flags=local)
    config = to_bridge_config(recipe, "runs/x")
    wrong, compared = _differing(config, recipe.to_megatron_args("runs/x"))
    assert (wrong, compared > 20) == ([], True)
    assert config.model.transformer.virtual_pipeline_model_parallel_size == layout.vpp
    assert config.ddp.use_distributed_optimizer
    names, weights = config.dataset.blend_per_split[0]
    assert names == [f"data/{name}" for name in recipe.data.prefixes]
    assert tuple(weights) == recipe.data.weights


@pytest.mark.skipif(HAS_BRIDGE, reason="megatron-bridge is installed")
def test_without_bridge_the_way_out_is_named():
    with pytest.raises(UserError, match=r"docs/compatibility\.md"):
        to_bridge_config(get_recipe("kimi_k2_pretrain_cpu"), "runs/x")
    assert "megatron.bridge" not in sys.modules


def test_fine_tuning_is_refused_with_the_reason():
    with pytest.raises(UserError, match="packs documents its own way"):
        to_bridge_config(get_recipe("kimi_k2_sft_cpu"), "runs/x")
