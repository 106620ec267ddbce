"""The report's schedule, run: expert all-to-all of one micro-batch under another's arithmetic.

Megatron's combined 1F1B over PP2 x VPP2 x EP2 on four ranks, weight gradients delayed, MuonClip
over ZeRO-1 with overlapped collectives; then the report's recompute, FP8 storage and offload too,
which are the flags a plan writes; then adapters over a frozen base. The same operations in another
order of micro-batches and layers: losses, gradient norm, S_max and loads equal to the last digit;
packed documents likewise, whose padding the schedule is not told of. Wrong variant: a step of
another batch. Not exercised: streams, so nothing is hidden under anything here.
"""

import pytest

from megatron_k2.planning.cost.offload import offload_modules
from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.support.distributed import BACKENDS, run_ranks
from tests.te.test_training import MODEL, TE

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RUN = """
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|t|L
    --expert-model-parallel-size 2 --global-batch-size 8 --train-samples 16 --save-interval 100
    --qk-clip-threshold 0.12
""".split()
OVERLAP = ["--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"]
RECOMPUTE = "--recompute-granularity selective --recompute-modules layernorm moe_act mla_up_proj"
MEMORY = [*RECOMPUTE.split(), "--fp8-activation-storage"]
OFFLOAD = [
    *"--fine-grained-activation-offloading --min-offloaded-tensor-size 1".split(),
    *"--activation-offload-fraction 0.6 --offload-modules".split(),
    *offload_modules(frozenset({"norm", "swiglu", "mla_up"})),
]
PACKED = (
    "--sft-data memory --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
    "--qk-clip-threshold 0.05"
).split()
ADAPTERS = "--lora-rank 8 --lr 1e-2 --lora-base {root}/plain/iter_0000002".split()
"""Over what the first case leaves."""
CASES = {
    "plain": [],
    "overlapped": OVERLAP,
    "memory": MEMORY,
    "memory, overlapped": [*MEMORY, *OVERLAP, *OFFLOAD],
    "packed, overlapped": [*PACKED, *MEMORY, *OVERLAP],
    "packed, memory": [*PACKED, *MEMORY],
    "adapters, memory": [*ADAPTERS, *MEMORY],
    "adapters, overlapped": [*ADAPTERS, *MEMORY, OVERLAP[0]],
    "another batch": [*OVERLAP, "--seed", "27"],
}


@pytest.fixture(scope="module", params=BACKENDS)
def records(request, _transformer_engine, tmp_path_factory):
    root = tmp_path_factory.mktemp("overlapped")
    cases = []
    for name, flags in CASES.items():
        own = [*flags, "--save", str(root / name)]
        words = [*MODEL, *TE, *RUN, *(word.replace("{root}", str(root)) for word in own)]
        packed = {"documents": 5} if "packed" in name else {}
        cases.append({"flags": words, "record": None, **packed})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
        run_ranks("tests.te.training_worker", 4, cases, root / "logs", request.param)
    return {name: read_records(root / name / METRICS_FILE) for name in CASES}


def numbers(records):
    return [
        (
            *(r.loss, r.grad_norm, r.max_logit_per_layer, r.num_clipped_heads),
            r.load_max_over_mean_per_layer,
        )
        for r in records
    ]


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("plain", "overlapped"),
        ("memory", "memory, overlapped"),
        ("packed, memory", "packed, overlapped"),
        ("adapters, memory", "adapters, overlapped"),
    ],
)
def test_overlapped_steps_are_the_others_to_the_last_digit(records, expected, found):
    assert len(records[expected]) == 2
    has_clipped = any(record.num_clipped_heads for record in records[expected])
    assert has_clipped != ("adapters" in expected), "a frozen weight is not clipped"
    assert numbers(records[found]) == numbers(records[expected])
    assert numbers(records["another batch"])[0] != numbers(records[expected])[0]
