"""What a MuonClip step over ZeRO-1 does, counted: collectives, host reads, matrices, state.

The group calls and tensor reads are interposed inside ``optimizer.step`` only, on four ranks (EP2
x expert-DP2) and on TP2 x DP2. Not exercised: NCCL's own synchronisation (``gpu`` bodies).
"""

import json

import pytest

from tests.distributed import run_ranks
from tests.parallel.test_layouts import EP2, MODEL, OVERLAP, TP2, ZERO

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 2
LAYOUTS = {"EP2xDP2": [*ZERO, *EP2, *OVERLAP], "TP2xDP2": [*ZERO, *TP2]}
OURS = "megatron_k2/optimizer"
UPSTREAM_READS = {
    "core/optimizer/clip_grads.py": "the global gradient norm",
    "core/optimizer/optimizer.py": "the decision to skip on overflow, and the norm it reports",
    "torch/optim/adamw.py": "AdamW on CPU reads its step counters",
}
"""Values that upstream reads back inside the step, by file; none may be added by us."""


@pytest.fixture(scope="module", params=LAYOUTS)
def counts(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    steps = ["--train-samples", str(12 * STEPS)]
    case = {"flags": [*MODEL, *LAYOUTS[request.param], *steps], "out": str(root)}
    run_ranks("tests.optimizer.counting_worker", 4, case, root / "logs")
    return [json.loads((root / f"counts{rank}.json").read_text()) for rank in range(4)]


def _ours(step):
    return {name: number for name, number in step.items() if OURS in name}


def test_one_max_all_reduce_and_two_exchanges_a_bucket(counts):
    for rank in counts:
        expected = 2 * sum(
            buckets
            for buckets, size in zip(rank["buckets"], rank["domain_sizes"], strict=True)
            if size > 1
        )
        for step in rank["collectives"]:
            ours = _ours(step)
            assert ours.pop(f"all_reduce MAX from {OURS}/max_logits.py") == 1
            assert ours.pop(f"all_to_all_single from {OURS}/exchange.py") == expected
            assert not ours, f"unexpected collectives: {ours}"


def test_nothing_is_read_back_to_the_host_by_our_modules(counts):
    for rank in counts:
        for step in rank["reads"]:
            ours = {line: number for line, number in step.items() if "megatron_k2" in line}
            assert not ours, ours


def test_the_watch_sees_upstreams_reads(counts):
    """Else the test above could not fail; and upstream's are where we say they are."""
    files = {line.split(":")[0] for rank in counts for step in rank["reads"] for line in step}
    assert "core/optimizer/clip_grads.py" in files
    assert files <= set(UPSTREAM_READS), files - set(UPSTREAM_READS)


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


def test_state_elements_over_all_ranks_equal_the_parameters_exactly(request, counts):
    """One momentum an element of a matrix, two moments an element of the rest, nothing padded."""
    total = sum(rank["state_elements"] for rank in counts)
    per_shard = [rank["muon_elements"] + 2 * rank["adam_elements"] for rank in counts]
    # Data-parallel ranks share each model shard: four ranks, two of them of the same one.
    if "TP2xDP2" in request.node.name:
        assert total == sum(per_shard) // 2
    else:
        experts = 3 * 4 * 3 * 64 * 32  # this rank's: layers x experts x matrices x elements
        dense = per_shard[0] - experts
        assert total == dense + 2 * experts
