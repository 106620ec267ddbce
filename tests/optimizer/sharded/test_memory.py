"""What MuonClip keeps and what a step takes on top, in bytes, from the tensors themselves.

bf16 parameters, fp32 gradients and masters, one rank: of D ranks each keeps 1/D of master and
momentum (that the elements add up is counted over ranks in ``test_counts.py``). Wrong
variant: a step that works on all buckets at once. Not exercised: the rounding of CUDA's allocator,
AdamW's step and the cast, which are the host's.
"""

import math
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch

from megatron_k2.optimizer.param_groups import muon_matrices
from tests.optimizer.test_muonclip import FLAGS
from tests.support.devices import DEVICES, here
from tests.support.single_rank import SMALL, arguments, build, one_rank

MODEL = replace(SMALL, moe_ffn_hidden_size=24)  # in bf16 rows of 16 bytes
BUCKET = 10_000
WORKING_SET = 24
"""Bytes an element of a batch while it is orthogonalised, of square matrices: fp32 copies while it
is normalised, then itself, R, B, Q and a product of them in bf16."""
PARAMETER, GRADIENT, MASTER, STATE = 2, 4, 4, 4


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


def built(is_sharded, *extra):
    """(model in bf16 in Megatron's wrapper, its optimizer), with ``extra`` flags."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_k2.training.hooks import TrainingHooks

    host = ["--optimizer", "adam", "--use-distributed-optimizer"] if is_sharded else []
    args = arguments(MODEL, *FLAGS, *host, "--bf16", *extra)
    args.optimizer = "adam" if is_sharded else "muonclip"
    model = build(MODEL, *FLAGS, "--bf16")
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=is_sharded,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        bucket_size=BUCKET,
    )
    ddp = DistributedDataParallel(model.config, config, Float16Module(model.config, model))
    optimizer_config, overrides = get_megatron_optimizer_config(args)
    hooks = TrainingHooks(args, None, None)
    optimizer = hooks.get_optimizer(
        get_megatron_optimizer, optimizer_config, [ddp], config_overrides=overrides
    )
    for param in ddp.parameters():
        param.main_grad.copy_(torch.randn(param.shape))
    return ddp, optimizer


def kept_bytes(ddp, optimizer):
    """(of Muon's matrices, of AdamW's parameters) and the elements of each."""
    matrices = muon_matrices([ddp])
    numel, kept = {True: 0, False: 0}, {True: 0, False: 0}
    for param in ddp.parameters():
        is_muon = param in matrices
        numel[is_muon] += param.numel()
        kept[is_muon] += sum(t.numel() * t.element_size() for t in (param, param.main_grad))
        # Without ZeRO the master is [rows, cols]; over ZeRO it is this rank's flat shard.
        main = param.main_param
        for part in optimizer.chained_optimizers:
            for tensor in [main] if main in part.optimizer.state else []:
                state = part.optimizer.state[tensor]
                tensors = [tensor, *(v for k, v in state.items() if k != "step")]
                kept[is_muon] += sum(t.numel() * t.element_size() for t in tensors)
    return numel, kept


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "over DistributedOptimizer"])
def test_bytes_kept_a_parameter_are_14_of_muon_and_18_of_adamw(is_sharded):
    """(8 / D + 6) and (12 / D + 6) with D = 1: shared are master and momentum, or both moments."""
    ddp, optimizer = built(is_sharded)
    optimizer.step()
    numel, kept = kept_bytes(ddp, optimizer)
    assert kept[True] == (PARAMETER + GRADIENT + MASTER + STATE) * numel[True] == 14 * numel[True]
    assert kept[False] == (PARAMETER + GRADIENT + MASTER + 2 * STATE) * numel[False]
    assert numel[True] > numel[False] > 0


def peak_bytes(call):
    """The most that was asked for at any time in ``call`` on top of what there was before."""
    if here().type == "cuda":
        return _peak_bytes_of_cuda(call)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _peak_bytes_of_cuda(call):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    call()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def test_a_step_takes_two_buckets_and_a_batch_on_top():
    _, optimizer = built(is_sharded=True)
    optimizer.step()
    (part,) = [o for o in optimizer.chained_optimizers if hasattr(o, "matrix_group")]
    matrices = [m for m in part.matrix_group.matrices if m.param in part._main_of]
    buckets = defaultdict(Counter)
    for blocks in part.matrix_group._blocks:
        for placement in blocks:
            buckets[placement.bucket][placement.shape] += math.prod(placement.shape)
    assert len(buckets) >= 4
    largest = max(shapes.total() for shapes in buckets.values())
    batch = max(max(shapes.values()) for shapes in buckets.values())
    allowed = 2 * GRADIENT * largest + WORKING_SET * batch

    def set_gradients():
        for main, _ in part._main_of.values():
            main.grad = torch.ones_like(main)

    set_gradients()
    taken = peak_bytes(lambda: part.matrix_group.run(part._directions, part._apply))
    assert taken <= allowed

    def at_once():
        directions = part._directions([m.param for m in matrices])
        part.matrix_group.run(lambda params: {p: directions[p] for p in params}, part._apply)

    set_gradients()
    assert peak_bytes(at_once) > allowed
