"""The plan's schedule and traffic against one real step over gloo, two ranks, counted.

Not exercised: the time anything takes.
"""

import json
from dataclasses import replace

import pytest

from megatron_k2.planning.cost import traffic
from megatron_k2.planning.cost.memory import rank_parameters
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.schedule.pipeline import ScheduleShape, rank_order
from megatron_k2.presets import get_preset
from tests.parallel.test_layouts import CP2, EP2, MODEL, PP2, TP2, VPP2, ZERO
from tests.support.distributed import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BATCH, FP32 = 4, 4
ONE_STEP = f"--global-batch-size {BATCH} --train-samples {BATCH}".split()
CASES = {"PP2xVPP2": VPP2, "PP2": PP2, "EP2": [*ZERO, *EP2], "TP2": TP2, "CP2": CP2}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    root = tmp_path_factory.mktemp("counted")
    cases = [
        {"name": name, "flags": [*MODEL, *flags, *ONE_STEP], "out": str(root)}
        for name, flags in CASES.items()
    ]
    run_ranks("tests.planning.traced_worker", 2, cases, root / "logs")
    return {
        name: [json.loads((root / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in CASES
    }


def _request(**layout):
    """The model of ``MODEL``."""
    preset = replace(
        get_preset("k2-tiny"), hidden_size=64, ffn_hidden_size=96, q_lora_rank=32,
        kv_lora_rank=16, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=16, num_moe_experts=8,
        moe_router_topk=2, moe_ffn_hidden_size=32, vocab_size=128,
    )  # fmt: skip
    return RunRequest(
        preset=preset,
        gpu=get_gpu("h100"),
        world_size=2,
        seq_length=64,
        sequences_per_step=BATCH,
        **layout,
    )


def _bytes(counts, call, phase="step", size=2):
    return counts["bytes"].get(f"{phase} {call} {size}", 0)


@pytest.mark.parametrize(("name", "vpp"), [("PP2xVPP2", 2), ("PP2", 1)])
def test_the_order_of_a_real_run_is_the_schedules(counted, name, vpp):
    shape = ScheduleShape(2, vpp, BATCH)
    for rank in range(2):
        expected = [[u.kind, u.microbatch, u.virtual] for u in rank_order(shape, rank)]
        assert counted[name][rank]["order"] == expected
    other = rank_order(ScheduleShape(2, vpp, BATCH, has_extra_warmup=vpp > 1), 0)
    if vpp > 1:
        assert counted[name][0]["order"] != [[u.kind, u.microbatch, u.virtual] for u in other]


@pytest.mark.parametrize(("name", "vpp"), [("PP2xVPP2", 2), ("PP2", 1)])
def test_pipeline_bytes_are_the_plans(counted, name, vpp):
    r = _request(pp=2, vpp=vpp)
    boundaries = 2 * vpp - 1
    planned = boundaries * BATCH * 2 * traffic.pipeline_send(r, FP32)  # forward and backward
    assert sum(_bytes(rank, "isend") for rank in counted[name]) == planned


def test_expert_bytes_are_the_plans_with_the_part_that_stays(counted):
    """Routing is not even, so the whole payload is compared: what stays included, both ranks."""
    r = _request(ep=2)
    a_layer = 4 * traffic.expert_dispatch(r, FP32) + 2 * traffic.expert_probabilities(r)
    planned = 3 * r.num_microbatches * 2 * a_layer / traffic._away(2)
    found = sum(_bytes(rank, "all_to_all_single") for rank in counted["EP2"])
    assert found == pytest.approx(planned, rel=0.01)


def test_zero_bytes_are_the_plans(counted):
    r = _request(ep=2)
    once = traffic.step_traffic(r, rank_parameters(r, 0))
    for rank in counted["EP2"]:
        scattered = _bytes(rank, "reduce_scatter_tensor") * traffic._away(2)
        assert scattered == pytest.approx(once.gradients, rel=0.01)
        gathered = _bytes(rank, "all_gather_into_tensor", "optimizer") * traffic._away(2)
        assert gathered * 2 / FP32 == pytest.approx(once.weights, rel=0.01)  # fp32 weights here


def test_the_exchange_of_matrices_is_at_most_the_plans(counted):
    """Over both ranks, of which one is home to more; what a rank sends to itself is taken off."""
    once = traffic.step_traffic(_request(ep=2), rank_parameters(_request(ep=2), 0))
    payload = sum(_bytes(rank, "all_to_all_single", "optimizer") for rank in counted["EP2"])
    found = payload * traffic._away(2) * 2 / FP32
    assert 0.5 * 2 * once.muonclip < found <= 1.01 * 2 * once.muonclip


def test_context_parallel_bytes_are_the_plans(counted):
    r = _request(cp=2)
    planned = 4 * r.num_microbatches * traffic.context_parallel(r, FP32)
    for rank in counted["CP2"]:
        found = _bytes(rank, "all_gather") * traffic._away(2)
        assert found == pytest.approx(planned, rel=0.01)


def test_tensor_parallel_bytes_are_the_plans(counted):
    r = _request(tp=2)
    split = traffic.tensor_parallel(r, FP32)
    planned = r.num_microbatches * (4 * (split.forward + split.backward) + split.ends)
    for rank in counted["TP2"]:
        calls = ("all_gather_into_tensor", "reduce_scatter_tensor")
        found = sum(_bytes(rank, call) for call in calls) * traffic._away(2)
        assert found == pytest.approx(planned, rel=0.01)
