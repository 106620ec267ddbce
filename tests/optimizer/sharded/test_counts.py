"""What a MuonClip step over ZeRO-1 does, counted: collectives, host reads, matrices, state.

The group calls and tensor reads are interposed inside ``optimizer.step`` only, on four ranks (EP2
x expert-DP2) and on TP2 x DP2. On GPUs over NCCL the same is counted; a synchronisation that no
Python call shows is not (``torch.cuda.set_sync_debug_mode`` would tell).
"""

import json

import pytest

from tests.parallel.test_layouts import BATCH, EP2, MODEL, OVERLAP, TP2, ZERO
from tests.support.distributed import BACKENDS, run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 2
LAYOUTS = {
    "EP2xDP2": [*ZERO, *EP2, *OVERLAP, "--log-muon-steps"],
    "TP2xDP2": [*ZERO, *TP2, "--log-muon-steps"],
}
OURS = "megatron_k2/optimizer"
UPSTREAM_READS = {
    "core/optimizer/clip_grads.py:138": "the global gradient norm",
}
"""What Megatron-Core 0.19.2 reads back inside the step; none may be added by us."""


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module", params=LAYOUTS)
def counts(request, backend, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    steps = ["--train-samples", str(BATCH * STEPS)]
    case = {"flags": [*MODEL, *LAYOUTS[request.param], *steps], "out": str(root)}
    run_ranks("tests.optimizer.sharded.counting_worker", 4, case, root / "logs", backend)
    return [json.loads((root / f"counts{rank}.json").read_text()) for rank in range(4)]


def _ours(step):
    return {name: number for name, number in step.items() if OURS in name}


def test_one_max_all_reduce_and_two_exchanges_a_bucket_of_dense_matrices(counts):
    """Experts are cut between matrices where their count divides, and are not exchanged at all."""
    for rank in counts:
        parts = zip(rank["buckets"], rank["group_sizes"], rank["are_experts"], strict=True)
        expected = 2 * sum(n for n, size, is_expert in parts if size > 1 and not is_expert)
        assert expected > 0
        for step in rank["collectives"]:
            ours = _ours(step)
            assert ours.pop(f"all_reduce MAX from {OURS}/qk_clip/max_logits.py") == 1
            assert ours.pop(f"all_to_all_single from {OURS}/sharded/transfer.py") == expected
            assert not ours, f"unexpected collectives: {ours}"


def test_no_expert_matrix_is_cut(counts):
    """Eight experts over expert-DP 4 under TP2, four over 2 under EP2."""
    assert all(any(rank["are_experts"]) for rank in counts)
    assert [rank["num_cut_experts"] for rank in counts] == [0] * 4


def test_nothing_is_read_back_to_the_host_by_our_modules(counts):
    for rank in counts:
        for step in rank["reads"]:
            ours = {line: number for line, number in step.items() if "megatron_k2" in line}
            assert not ours, ours


def test_upstreams_reads_are_exactly_the_known_ones(counts):
    """Else the test above could not fail: the watch does see reads."""
    for rank in counts:
        assert rank["reads"] == [dict.fromkeys(UPSTREAM_READS, 1)] * STEPS


def test_every_matrix_is_orthogonalized_exactly_once_in_the_world(request, counts):
    copies = 2 if "TP2xDP2" in request.node.name else 1
    total = sum(rank["orthogonalized"] for rank in counts)
    if copies == 2:  # every rank knows every matrix
        assert total == STEPS * counts[0]["num_matrices"]
        return
    # EP2: dense matrices are known to all four ranks, an expert's to the two that hold it.
    experts = 3 * 8 * 3  # layers x experts x (gate, up, down)
    local_experts = experts // 2
    dense = counts[0]["num_matrices"] - local_experts
    assert total == STEPS * (dense + experts)


def test_state_elements_over_all_ranks_equal_the_parameters_exactly(counts):
    """One momentum an element of a matrix, two moments an element of the rest, nothing padded."""
    assert sum(r["state_elements"] for r in counts) == sum(r["expected_state"] for r in counts)


def test_both_groups_together_are_balanced(counts):
    """Longest processing time first: within 5 % of the mean even at these sizes."""
    assert max(part for rank in counts for part in rank["imbalance"]) < 1.05
