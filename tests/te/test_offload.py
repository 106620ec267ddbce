"""Activations stored in FP8 and then moved to the host by Megatron's fine-grained offload.

Megatron's manager, groups, margins and reloads run as they are, with its test for CUDA tensors
taken away, so that a CPU's are handed over too: what reaches the host, in which form, and what
comes back. Two micro-batches, the second of which uses the groups the first laid out. Equality is
to the bit: copies, and the same codes. Wrong variant: offload without storage, which moves the
experts' tensors in full. Not exercised: streams, whose order is Megatron's own.
"""

import pytest
import torch

from megatron_k2.fp8.tiles import E4M3, num_tiles
from tests.support.single_rank import SMALL, one_rank
from tests.te.models import TE_FLAGS, batch, differing, local_name, token_losses
from tests.te.worker import whole_weight

GROUPS = ("expert_fc1", "moe_act")
OFFLOAD = f"--fine-grained-activation-offloading --offload-modules {' '.join(GROUPS)}".split()
SMALLEST = ["--min-offloaded-tensor-size", "1"]
TOKENS = 2 * 32 * SMALL.moe_router_topk
"""Of one micro-batch, over all experts."""
TIMES = 3
"""Two MoE layers, two micro-batches; after the first Megatron keeps each name's last group."""


@pytest.fixture(scope="module", autouse=True)
def _rank(_transformer_engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVTE_CPU_OFFLOAD_V1", "1")  # Megatron insists
        with one_rank():
            yield


@pytest.fixture
def moved(monkeypatch):
    """What the manager copied to the host, as (dtype, bytes), in order."""
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as room

    def manages(tensor):
        return not isinstance(tensor, torch.nn.Parameter)

    handler, found = room.ChunkOffloadHandler, []
    if not torch.cuda.is_available():
        monkeypatch.setattr(handler, "_can_manage_tensor_for_offload", staticmethod(manages))
    copy = handler.offload

    def offload(self, tensor, *args, **kwargs):
        found.append((tensor.dtype, tensor.nbytes))
        return copy(self, tensor, *args, **kwargs)

    monkeypatch.setattr(handler, "offload", offload)
    room.PipelineOffloadManager.reset_instance()
    yield found
    room.PipelineOffloadManager.reset_instance()


def train(*flags, is_stored):
    """(losses, gradients) of two steps of one micro-batch each."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        FineGrainedActivationOffloadingInterface,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_k2.model.build import K2ModelBuilder, model_config_from_args
    from tests.support.single_rank import arguments

    config = model_config_from_args(arguments(SMALL, *TE_FLAGS, *flags))
    config.transformer.bias_activation_fusion = True  # off on the CPU host, on wherever TE runs
    config.fp8_activation_storage = is_stored
    model = K2ModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    for name, param in model.named_parameters():
        param.data.copy_(whole_weight(local_name(name), list(param.shape)))
    model.train()
    losses = []
    for _ in range(2):
        loss = token_losses(model, *batch()).mean()
        loss.backward()
        losses.append(loss.detach())
        if flags:
            FineGrainedActivationOffloadingInterface.reset()
    return losses, {name: param.grad for name, param in model.named_parameters()}


def test_codes_and_scales_go_to_the_host_and_gradients_are_bit_equal(host, moved):
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        PipelineOffloadManager,
    )

    expected = train(is_stored=True)
    assert not moved
    found = train(*OFFLOAD, *SMALLEST, is_stored=True)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert not differing(found[1], expected[1])
    widths, weights = (SMALL.hidden_size, 2 * SMALL.moe_ffn_hidden_size), 4 * TOKENS
    codes = TOKENS * sum(widths)
    scales = 4 * TOKENS * sum(num_tiles(width) for width in widths)
    assert bytes_of(moved, E4M3) == TIMES * codes
    assert bytes_of(moved, torch.float32) == TIMES * (scales + weights)
    moved.clear()
    PipelineOffloadManager.reset_instance()  # it has laid out the groups of one model
    plain = train(*OFFLOAD, *SMALLEST, is_stored=False)
    assert bytes_of(moved, torch.float32) == TIMES * (4 * TOKENS * sum(widths) + weights)
    assert differing(plain[1], found[1])


def bytes_of(moved, dtype):
    return sum(size for kind, size in moved if kind == dtype)


RECOMPUTE = "--recompute-granularity selective --recompute-modules layernorm moe_act mla_up_proj"
STAYS = ["--min-offloaded-tensor-size", str(TOKENS + 1)]
"""Statistics, routing weights and scales of so few tokens: on a GPU of real size the first two."""


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.6, 0.3])
def test_a_plans_groups_move_what_the_planner_says(host, moved, is_stored, fraction):
    """The report's recompute; layers in the forward's order, the last groups kept by the fraction.

    Megatron leaves on the device, beside those, each name's last group of a step.
    """
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        PipelineOffloadManager,
    )

    from megatron_k2.planning.cost.offload import is_kept_on_device, layer_groups, offload_modules

    recompute = frozenset({"norm", "swiglu", "mla_up"})
    expected = train(*RECOMPUTE.split(), is_stored=is_stored)
    flags = ["--fine-grained-activation-offloading", "--offload-modules"]
    flags += [*offload_modules(recompute), *STAYS, "--activation-offload-fraction", str(fraction)]
    found = train(*RECOMPUTE.split(), *flags, is_stored=is_stored)
    assert not differing(found[1], expected[1])
    groups = [
        group
        for layer in range(SMALL.num_layers)
        for group in layer_groups(
            SMALL, 1, recompute, is_moe=layer >= SMALL.num_dense_layers, fp8_storage=False
        )
    ]
    last = {group.module: index for index, group in enumerate(groups)}
    can = [group for index, group in enumerate(groups) if index != last[group.module]]
    kept = is_kept_on_device(len(can), fraction)
    moves = [group for group, stays in zip(can, kept, strict=True) if not stays]
    manager, by_module = PipelineOffloadManager.get_instance(), {}
    for group in moves:
        size = group.off_device * 2 * 32  # bf16 in the plan
        is_fp8 = is_stored and group.module in GROUPS
        size *= 0.5 if is_fp8 else 2
        by_module[group.module] = by_module.get(group.module, 0) + size
    assert manager.offload_summary_bytes == by_module
    assert len(moves) < len(can) or fraction == 1.0


def test_the_core_attentions_group_copies_what_is_computed_again(host, moved):
    """Why a plan that recomputes queries, keys and values does not offload it."""
    train(*RECOMPUTE.split(), *OFFLOAD[:2], "core_attn", *SMALLEST, is_stored=False)
    width = SMALL.qk_head_dim + SMALL.qk_pos_emb_head_dim
    query = 2 * 32 * SMALL.num_attention_heads * width * 4
    assert sum(size == query for _, size in moved) >= 2 * (2 * SMALL.num_layers - 1)
