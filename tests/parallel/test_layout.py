"""What ``check_layout`` refuses, with which words, and that what it accepts divides everything.

Whether accepted layouts train correctly is ``test_layouts.py``.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import Layout, Workload, check_layout, nearest_divisors

LAYOUT = Layout(world_size=16)
WORKLOAD = Workload(
    num_layers=12, num_attention_heads=8, num_moe_experts=24, seq_length=64, global_batch_size=16
)


def changed(changes):
    """``LAYOUT`` and ``WORKLOAD``, each with those of ``changes`` that are its fields."""
    return [
        replace(part, **{name: value for name, value in changes.items() if hasattr(part, name)})
        for part in (LAYOUT, WORKLOAD)
    ]


REFUSED = {
    "world": (
        {"world_size": 12, "tp": 8},
        ["world size 12", "8 x 1 x 1 = 8", "multiple of 8"],
    ),
    "expert ranks": (
        {"ep": 6},
        ["world size 16", "1 x 6 x 1 = 6", "multiple of 6"],
    ),
    "heads": (
        {"num_attention_heads": 6, "tp": 4},
        ["num_attention_heads=6", "tensor_model_parallel_size=4", "nearest: 3, 6"],
    ),
    "experts": (
        {"world_size": 20, "ep": 10, "global_batch_size": 20},
        ["num_moe_experts=24", "expert_model_parallel_size=10", "nearest: 8, 12"],
    ),
    "zigzag": (
        {"seq_length": 66, "cp": 2},
        ["seq_length=66", "2 x context_parallel_size=4", "nearest: 64, 68"],
    ),
    "sequence shorter than zigzag": (
        {"seq_length": 2, "cp": 4},
        ["seq_length=2", "nearest: 8"],
    ),
    "sequence parallel": (
        {"seq_length": 36, "tp": 8},
        ["seq_length=36", "tensor_model_parallel_size=8", "nearest: 32, 40"],
    ),
    "batch": (
        {"global_batch_size": 40, "micro_batch_size": 1},
        ["global_batch_size=40", "1 x 16 = 16", "nearest: 32, 48"],
    ),
    "layers": (
        {"num_layers": 10, "pp": 4},
        ["num_layers=10", "4 x 1", "--pipeline-model-parallel-layout", "divisor: 2, 5"],
    ),
    "virtual layers": (
        {"pp": 4, "vpp": 2},
        ["num_layers=12", "4 x 2", "--pipeline-model-parallel-layout", "divisor: 6, 12"],
    ),
    "virtual without pipeline": (
        {"vpp": 2},
        ["--pipeline-model-parallel-size"],
    ),
    "silently wrong PP2 x VPP": (
        {
            "pp": 2,
            "vpp": 2,
            "overlap_p2p_comm": False,
        },
        ["PP=2", "--no-overlap-p2p-communication"],
    ),
    "zero ranks of a kind": (
        {"tp": 0},
        ["tensor_model_parallel_size=0", "at least 1"],
    ),
    "zero micro batch": ({"micro_batch_size": 0}, ["micro_batch_size=0", "at least 1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_value_what_it_must_divide_by_and_the_nearest(case):
    changes, words = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        check_layout(*changed(changes))
    missing = [word for word in words if word not in str(refusal.value)]
    assert not missing, str(refusal.value)


ACCEPTED = {
    "one rank": {"world_size": 1},
    "everything at once": {
        "tp": 2,
        "pp": 2,
        "cp": 2,
        "ep": 8,
        "vpp": 3,
    },
    "uneven layers placed by hand": {
        "num_layers": 61,
        "pp": 16,
        "pipeline_layout": "E|t*61|L",
    },
    "a dense model has no experts to divide": {
        "num_moe_experts": None,
        "ep": 3,
    },
    "PP2 x VPP with overlap": {"pp": 2, "vpp": 2},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_can_run_is_accepted(case):
    check_layout(*changed(ACCEPTED[case]))


SMALL = st.integers(1, 6)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    world=st.sampled_from([1, 2, 4, 6, 8, 12, 16, 24]),
    layers=st.integers(1, 24),
    heads=st.sampled_from([2, 4, 6, 8, 12]),
    experts=st.sampled_from([None, 4, 6, 8, 12]),
    seq=st.sampled_from([16, 24, 32, 48, 60]),
    batch=st.integers(1, 48),
    degrees=st.tuples(SMALL, SMALL, SMALL, SMALL, SMALL, SMALL),
)
def test_an_accepted_layout_divides_everything(world, layers, heads, experts, seq, batch, degrees):
    tp, pp, cp, ep, etp, vpp = degrees
    layout = Layout(world, tp, pp, ep, vpp, cp, etp)
    load = Workload(layers, heads, experts, seq, batch)
    divides = (
        world % (tp * pp * cp) == 0
        and (experts is None or (world % (ep * etp * pp) == 0 and experts % ep == 0))
        and heads % tp == 0
        and (cp == 1 or seq % (2 * cp) == 0)
        and seq % (cp * tp) == 0
        and batch % (world // (tp * pp * cp) or 1) == 0
        and layers % (pp * vpp) == 0
        and (vpp == 1 or pp > 1)
    )
    try:
        check_layout(layout, load)
    except UserError:
        assert not divides
    else:
        assert divides


@given(st.integers(1, 400), st.integers(1, 500))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_nearest_divisors_divide_and_none_lies_between(number, wanted):
    near = nearest_divisors(number, wanted)
    assert near == sorted(near)
    assert all(number % d == 0 for d in near)
    between = [
        d
        for d in range(1, number + 1)
        if number % d == 0 and d != wanted and min(near) < d < max(near)
    ]
    assert not between or len(near) == 1
