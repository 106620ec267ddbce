"""Megatron's own ``muon`` state taken over: its recurrence against ours, and through a checkpoint.

The recurrence is Emerging-Optimizers' (``orthogonalized_optimizer.py``), written out in fp64. The
checkpoint test writes with upstream's optimizer and loads with ours on one rank. Not exercised:
bf16 masters, expert parallelism.
"""

import pytest
import torch

from megatron_k2.errors import UserError
from megatron_k2.optimizer.foreign_state import adopt_groups, take_over, upstream_momentum
from megatron_k2.optimizer.muon import update_momentum
from megatron_k2.optimizer.sharded.chain import FORMAT
from tests.parallel.test_layouts import BATCH, MODEL, ZERO, _load
from tests.support.distributed import run_ranks

MU = 0.95


def _upstream_direction(momentum, grad):
    momentum.lerp_(grad, 1 - MU)
    return grad.lerp(momentum, MU)


def _state(momentum):
    muon = {"params": [0], "lr": 1.0, "momentum": MU, "weight_decay": 0.1}
    norms = {"params": [0], "lr": 1.0, "betas": (0.9, 0.95), "wd_mult": 0.0}
    others = norms | {"params": [1], "wd_mult": 1.0}
    return {
        0: {"state": {0: {"momentum_buffer": momentum}}, "param_groups": [muon]},
        1: {"state": {0: {}, "common_step": 7.0}, "param_groups": [norms, others]},
    }


OWN = [[{"params": [0], "lr": 0.5}], [{"params": [0, 1], "betas": (0.9, 0.95)}]]


@pytest.mark.parametrize("is_taken_over", [True, False], ids=["taken over", "m taken for M"])
def test_steps_after_the_take_over_go_where_upstreams_would_have_gone(is_taken_over):
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(8, 6, 4, generator=generator, dtype=torch.float64)
    upstream = torch.zeros(6, 4, dtype=torch.float64)
    for grad in grads[:5]:
        _upstream_direction(upstream, grad)
    state = _state(upstream.clone())
    if is_taken_over:
        take_over(state, MU, OWN)
    ours = state[0]["state"][0]["momentum_buffer"]
    largest = 0.0
    for grad in grads[5:]:
        expected = _upstream_direction(upstream, grad)
        found = update_momentum(ours, grad, MU, nesterov=True)
        difference = found / found.norm() - expected / expected.norm()
        largest = max(largest, difference.abs().max().item())
    assert (largest < 1e-14) == is_taken_over


def test_groups_are_ours_and_adamws_step_count_is_kept():
    state = _state(torch.ones(2, 2))
    take_over(state, MU, OWN)
    assert [state[i]["param_groups"] for i in (0, 1)] == OWN
    assert state[1]["state"]["common_step"] == 7.0
    assert upstream_momentum(state) is None, "saved again, it is ours"


def test_our_own_groups_are_this_runs_but_for_the_step_count():
    """Numbers, which are not saved, and rates, which may be another phase's."""
    saved = {i: {"state": {}, "param_groups": [{"max_lr": 0.1 + i, "step": 7}]} for i in (0, 1)}
    own = [[{**groups[0], "max_lr": 0.5, "step": 0}] for groups in OWN]
    adopt_groups(saved, own)
    assert [saved[i]["param_groups"] for i in (0, 1)] == [[{**g[0], "step": 7}] for g in own]
    with pytest.raises(UserError, match=r"has \[1, 1\] parameter groups.* this run \[2, 1\]"):
        adopt_groups(saved, [OWN[0] * 2, OWN[1]])


def test_a_chain_in_the_other_order_keeps_the_step_count_too():
    state = _state(torch.ones(2, 2))
    state[0]["param_groups"], state[1]["param_groups"] = (
        state[1]["param_groups"],
        state[0]["param_groups"],
    )
    state[0]["state"]["common_step"] = state[1]["state"].pop("common_step")
    take_over(state, MU, OWN)
    assert state[1]["state"]["common_step"] == 7.0
    assert "common_step" not in state[0]["state"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 1.5}, r"momentum \[1.5\], expected one number in \[0, 1\)"),
        ({"beta2": 0.95}, "adaptive_muon"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_with_the_way_out(change, message):
    state = _state(torch.ones(2, 2))
    state[0]["param_groups"][0] |= change
    with pytest.raises(UserError, match=f"{message}.*--no-load-optim"):
        upstream_momentum(state)


@pytest.mark.parametrize("state", [{"format": FORMAT}, {0: {"layer_wise": 1}}, None])
def test_another_kind_of_state_is_refused(state):
    with pytest.raises(UserError, match=r"no kind known here.*--no-load-optim"):
        upstream_momentum(state)


TWO_STEPS = f"--train-samples {2 * BATCH} --save-interval".split()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(checkpoint by Megatron's muon, loaded and saved by MuonClip without a step, again)."""
    root = tmp_path_factory.mktemp("import")
    theirs, ours = root / "theirs", root / "ours"
    write = [*MODEL, *TWO_STEPS, "2", "--optimizer", "muon", "--save", str(theirs)]
    read = [*MODEL, *TWO_STEPS, "5", "--load", str(theirs), "--save", str(ours)]
    again = [*MODEL, *TWO_STEPS, "5", "--load", str(ours), "--save", str(root / "again")]
    cases = [{"flags": write}, {"flags": read}, {"flags": again}]
    run_ranks("tests.parallel.worker", 1, cases, root / "logs")
    return theirs, ours, root / "again"


def _everything(directory):
    from torch.distributed.checkpoint import FileSystemReader

    iteration = directory / "iter_0000002"
    metadata = FileSystemReader(iteration).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size)
        for key, entry in metadata.items()
        if hasattr(entry, "size") and not key.startswith("rng") and "expert_bias" not in key
    }
    _load(state, iteration)
    return state


@pytest.mark.dist
@pytest.mark.slow
def test_a_checkpoint_of_megatrons_muon_loads_with_momentum_weights_and_moments_exact(loaded):
    theirs, ours, _ = (_everything(directory) for directory in loaded)
    assert theirs.keys() == ours.keys()
    momenta = [key for key in theirs if ".momentum_buffer." in key]
    assert len(momenta) > 20
    for key, expected in theirs.items():
        found = ours[key]
        if key in momenta:
            assert expected.abs().max() > 0
            expected = expected / (1 - MU)
        assert torch.equal(found, expected), key


@pytest.mark.dist
@pytest.mark.slow
def test_once_taken_over_it_is_ours_and_loads_as_it_is(loaded):
    _, ours, again = (_everything(directory) for directory in loaded)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)


@pytest.mark.dist
@pytest.mark.slow
def test_over_zero_the_same_checkpoint_is_refused_before_it_is_read(loaded, tmp_path):
    read = [*MODEL, *ZERO, *TWO_STEPS, "5", "--load", str(loaded[0]), "--save", str(tmp_path / "s")]
    with pytest.raises(AssertionError, match="continue without that flag"):
        run_ranks("tests.parallel.worker", 1, [{"flags": read}], tmp_path / "logs")
