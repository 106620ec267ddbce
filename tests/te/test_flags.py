"""The flags of Transformer Engine's path on GPUs, through Megatron's own parser and validation.

The whole Kimi K2 at the report's layout under a faked world; parsed only, nothing is built. The
same for every FP8 recipe and for what saves activation memory.
"""

import sys

import pytest

from megatron_k2.flags.megatron import add_k2_arguments, expand

LAYOUT = """
    --preset kimi-k2 --mock-data --bf16 --use-distributed-optimizer
    --transformer-impl transformer_engine --pipeline-model-parallel-size 16
    --expert-model-parallel-size 16 --expert-tensor-parallel-size 1
    --pipeline-model-parallel-layout Et*3|t*3|t*3|(t*4|)*12t*4L
""".split()


@pytest.fixture
def validated(_transformer_engine, monkeypatch):
    """Megatron's arguments and the model's config for the flags of a CUDA machine."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_k2.host.cpu import megatron_host
    from megatron_k2.model.build import model_config_from_args

    monkeypatch.setenv("WORLD_SIZE", "256")
    monkeypatch.setenv("RANK", "0")

    def validate(*extra):
        flags = expand([*LAYOUT, *extra], cuda=True)
        monkeypatch.setattr(sys, "argv", ["train", *flags])
        with megatron_host():
            args = parse_args(add_k2_arguments)
            validate_args(args)
            args.padded_vocab_size = args.vocab_size
            return args, model_config_from_args(args)

    return validate


def test_the_fusions_of_transformer_engine_are_on(validated):
    args, model = validated()
    config = model.transformer
    assert config.transformer_impl == "transformer_engine"
    assert config.moe_grouped_gemm
    assert config.moe_permute_fusion
    assert config.moe_router_fusion
    assert config.bias_activation_fusion
    assert config.cross_entropy_loss_fusion
    assert config.attention_backend.name == "fused"
    assert config.log_max_attention_logit
    assert not config.qk_clip
    assert not args.qk_clip, "Megatron's own clip would act besides ours"
    assert config.fp8 is None


@pytest.mark.parametrize("recipe", ["blockwise", "delayed"])
def test_fp8_compute_keeps_router_head_and_attention_out(validated, recipe):
    _, model = validated("--fp8-compute", recipe)
    config = model.transformer
    assert config.fp8_recipe == recipe
    assert config.moe_router_dtype == "fp32"
    assert not config.fp8_dot_product_attention
    assert not config.fp8_multi_head_attention
    assert not config.fp8_output_proj


def test_the_reports_activation_memory_scheme_is_accepted(validated):
    from megatron_k2.fp8.storage import check_storable

    scheme = "layernorm mla_up_proj moe_act mlp".split()
    recompute = ["--recompute-granularity", "selective", "--recompute-modules", *scheme]
    _, model = validated("--fp8-activation-storage", *recompute)
    assert model.fp8_activation_storage
    assert model.transformer.recompute_modules == scheme
    check_storable(model.transformer)


@pytest.mark.parametrize("part", [0.0, 0.55])
def test_a_plan_is_accepted_as_flags(validated, monkeypatch, part):
    """Layout, overlap, recompute, FP8 storage, both offloads: all that the planner writes."""
    from megatron_k2.flags.layout import megatron_flags
    from megatron_k2.fp8.compute import OFFLOAD_V1, choose_offload_version
    from megatron_k2.planning.memory_fit import fit_to_memory
    from tests.planning.cost.test_memory import request

    world = 256 if part else 512
    planned = fit_to_memory(
        request(vpp=2, world=world, optimizer_offload=part), fixed={"optimizer_offload"}
    )
    flags = megatron_flags(planned)
    environment: dict[str, str] = {}
    choose_offload_version(flags, environment)
    monkeypatch.setenv(OFFLOAD_V1, environment[OFFLOAD_V1])
    args, model = validated(*flags)
    config = model.transformer
    assert config.fine_grained_activation_offloading
    assert {"expert_fc1", "moe_act"} <= set(config.offload_modules)
    assert planned.activation_offload < config.activation_offload_fraction < 1
    assert args.virtual_pipeline_model_parallel_size == 2
    assert args.muonclip_cpu_offload == bool(part)
    assert not args.optimizer_cpu_offload
    assert not part or args.optimizer_offload_fraction == part
