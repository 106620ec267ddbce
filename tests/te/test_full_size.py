"""The whole Kimi K2 from TE modules on the meta device: every name and shape.

A fake process group stands for 32 ranks. The local modules, built the same way, are the oracle for
names in a checkpoint and global shapes; ``planning/cost/shapes.py`` for what a rank holds. Not
exercised: values.
"""

from collections import Counter

import pytest
import torch

from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.planning.cost.shapes import rank_weights
from megatron_k2.presets import KIMI_K2

EP = 32


def _build(*flags):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_k2.model.build import K2ModelBuilder, model_config_from_args
    from tests.support.single_rank import arguments

    batch = f"--expert-model-parallel-size {EP} --global-batch-size {EP} --bf16".split()
    config = model_config_from_args(arguments(KIMI_K2, *flags, *batch))
    config.transformer.use_cpu_initialization = False
    config.transformer.perform_initialization = False
    return K2ModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


@pytest.fixture(scope="module")
def models(_transformer_engine, monkeypatch_module):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tests.te.models import LOCAL_FLAGS, TE_FLAGS
    from tests.te.standin.devices import cuda_means

    monkeypatch_module.setenv("WORLD_SIZE", str(EP))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=EP)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=EP, create_gloo_process_groups=False
    )
    try:
        with cuda_means("meta"):
            model_parallel_cuda_manual_seed(1)
            yield tuple(_build(*kind) for kind in (LOCAL_FLAGS, TE_FLAGS))
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def _in_checkpoint(model):
    """Name -> global shape of every tensor a checkpoint would hold."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = {}
    for entry in model.sharded_state_dict(metadata={"singleton_local_shards": False}).values():
        parts = [entry]
        if isinstance(entry, ShardedTensorFactory):
            parts = entry.build()
        for part in parts:
            if isinstance(part, ShardedTensor):
                found[part.key] = part.global_shape
    return found


def test_a_ranks_weights_have_the_shapes_of_the_closed_form(models):
    expected = rank_weights(KIMI_K2, range(61), tp=1, ep=EP, has_embedding=True, has_head=True)
    _, te = models
    held = {name for name, param in te.named_parameters() if not param.is_meta}
    assert all(name.endswith("mlp.router.weight") for name in held), "Megatron makes them on CPU"
    assert Counter(tuple(p.shape) for p in te.parameters()) == Counter(w.shape for w in expected)
    experts = sum(p.numel() for n, p in te.named_parameters() if ".experts." in n)
    whole = sum(p.numel() for p in te.parameters()) + (EP - 1) * experts
    assert whole == count_parameters(KIMI_K2).trainable == 1_026_408_209_408


def test_a_checkpoint_has_the_local_modules_names_and_shapes(models):
    local, te = map(_in_checkpoint, models)
    assert len(te) > 700
    assert te == local


def test_without_the_renaming_fused_norms_would_have_other_names(models):
    _, te = models
    for layer in te.decoder.layers:
        layer.submodules_config.sharded_state_dict_keys_map = {}
    assert any(name.endswith("linear_kv_up_proj.layer_norm_weight") for name in _in_checkpoint(te))
