"""What the plan says a trainer holds against the tensors of real ranks, behind a real step.

k2-tiny, MuonClip, fp32 over gloo: weights, gradients and states, by storage. Not exercised: what
CUDA, NCCL and engines keep, which are assumptions with a name; bf16, whose bytes an element are
``tests/optimizer/sharded/test_memory.py``'s.
"""

import json

import pytest

from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.rl.memory import trainer_layout
from megatron_k2.presets import K2_TINY
from megatron_k2.recipes.cpu import CPU
from tests.parallel.test_layouts import EP2, PP2, TP2, ZERO
from tests.support.distributed import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LAYOUTS = {
    1: {"one": ([], {})},
    2: {
        "TP2": (TP2, {"tp": 2}),
        "PP2": (PP2, {"pp": 2}),
        "ZeRO": (ZERO, {}),
        "ZeRO EP2": ([*ZERO, *EP2], {"ep": 2}),
    },
}
CASES = [(size, name) for size, layouts in LAYOUTS.items() for name in layouts]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    root = tmp_path_factory.mktemp("held")
    for size, layouts in LAYOUTS.items():
        cases = [{"flags": flags, "out": str(root / name)} for name, (flags, _) in layouts.items()]
        run_ranks("tests.planning.rl.held_worker", size, cases, root / f"logs{size}")

    def read(name, size):
        return [json.loads((root / name / f"{rank}.json").read_text()) for rank in range(size)]

    return read


def _request(size=1, **layout):
    return RunRequest(
        preset=K2_TINY, gpu=CPU, world_size=size, seq_length=64, sequences_per_step=16, **layout
    )


def _planned(size, name, rank):
    flags, layout = LAYOUTS[size][name]
    r = _request(size, **layout)
    return trainer_layout(r, rank if r.pp > 1 else 0, "fp32", is_zero=flags[:1] == ZERO)


@pytest.mark.parametrize(("size", "name"), CASES)
def test_the_plan_adds_up_to_what_a_rank_holds(size, name, counted):
    for rank, found in enumerate(counted(name, size)):
        planned = vars(_planned(size, name, rank))
        train = found["train"]
        assert train.pop("elements") * 4 == planned["weights"], "biases are buffers, not weights"
        assert train == pytest.approx(planned, rel=1e-3)
        assert found["told"] == pytest.approx(planned, rel=1e-3), "and so says the run itself"


@pytest.mark.parametrize(("size", "name"), CASES)
def test_while_it_rests_gradients_are_gone(size, name, counted):
    """On a CPU there is one memory: weights and states stay where they are."""
    for rank, found in enumerate(counted(name, size)):
        planned = vars(_planned(size, name, rank)) | {"gradients": 0}
        assert found["update"] == pytest.approx(planned, rel=1e-3)


def test_a_plan_with_masters_beside_fp32_weights_would_be_seen(counted):
    (found,) = counted("one", 1)
    wrong = vars(trainer_layout(_request(), 0, "bf16", is_zero=False))
    assert found["train"]["optimizer"] != pytest.approx(wrong["optimizer"], rel=0.2)
