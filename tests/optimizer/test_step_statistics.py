"""Update RMS and seconds of a step, against the weights it moved and clocks that are set.

What the learning rate multiplied is read off the weights: W <- W (1 - ηλ) - η u. Wrong variants: a
root mean square over all groups together, and one without the factor 0.2 sqrt(max(n, m)). Not
exercised: CUDA events.
"""

import math

import pytest
import torch

from megatron_k2.optimizer import step_statistics
from megatron_k2.optimizer.param_groups import muon_matrices
from megatron_k2.optimizer.step_statistics import GROUPS, StepStatistics
from megatron_k2.training.step_log import StepLog
from tests.optimizer.sharded.counting_worker import Watch
from tests.optimizer.test_muonclip import DECAY, LR, _built_with_hooks, _set_gradients
from tests.support.single_rank import one_rank

FLAG = ["--log-muon-steps"]


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


def _group(param, specs):
    if param not in specs:
        return "adamw"
    return "experts" if specs[param].is_expert else "dense"


def _records(ddp, optimizer, hooks, num_steps):
    """(record, update of each parameter) a step, through the log as training drives it."""
    shown = []
    hooks.args.consumed_train_samples = 1
    log = StepLog(hooks.args, [ddp], hooks.max_logits, lambda record, _: shown.append(record))
    log.chain = hooks.step_log.chain
    ddp.module.config.finalize_model_grads_func([ddp])
    updates = []
    for step in range(num_steps):
        before = {p: p.detach().clone() for p in ddp.parameters()}
        _set_gradients(ddp, step)
        hooks.max_logits.running.fill_(1.0)
        assert optimizer.step()[0]
        updates.append({p: (w * (1 - LR * DECAY) - p) / LR for p, w in before.items()})
        log.step({}, LR, step + 1, False, 1.0)
    log.flush()
    return list(zip(shown, updates, strict=True))


def _rms(updates):
    squares = sum(u.detach().double().square().sum().item() for u in updates)
    return math.sqrt(squares / sum(u.numel() for u in updates))


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "over DistributedOptimizer"])
def test_rms_of_each_group_is_what_the_weights_moved_by(is_sharded):
    ddp, optimizer, hooks = _built_with_hooks(is_sharded, FLAG)
    specs = muon_matrices([ddp])
    for record, updates in _records(ddp, optimizer, hooks, 3):
        assert set(record.update_rms) == set(GROUPS)
        of = {g: [u for p, u in updates.items() if _group(p, specs) == g] for g in GROUPS}
        for group, rms in record.update_rms.items():
            assert rms == pytest.approx(_rms(of[group]), rel=1e-3), group
        together = _rms(updates.values())
        unscaled = record.update_rms["dense"] / 0.2
        for wrong in (together, unscaled):
            assert wrong != pytest.approx(_rms(of["dense"]), rel=1e-2)
        # jordan leaves singular values around 1
        assert record.update_rms["dense"] == pytest.approx(0.2, rel=0.3)
        assert record.update_rms["experts"] == pytest.approx(0.2, rel=0.3)


def test_without_the_flag_nothing_is_recorded():
    ddp, optimizer, hooks = _built_with_hooks()
    ((record, _),) = _records(ddp, optimizer, hooks, 1)
    assert record.update_rms is None
    assert record.exchange_seconds is None
    assert record.newton_schulz_seconds is None


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "over DistributedOptimizer"])
def test_a_watched_step_reads_nothing_back_to_the_host(is_sharded):
    ddp, optimizer, hooks = _built_with_hooks(is_sharded, FLAG)
    for step in range(2):
        _set_gradients(ddp, step)
        hooks.max_logits.running.fill_(1.0)
        with Watch() as watch:
            optimizer.step()
        assert watch.reads.found, "the watch sees upstream's reads"
        assert not [line for line in watch.reads.found if "megatron_k2/optimizer" in line]
        assert not [name for name in watch.collectives if "megatron_k2/optimizer" in name]


def test_seconds_of_a_step_are_those_of_its_batches_and_no_other_steps():
    ddp, optimizer, hooks = _built_with_hooks(False, FLAG)
    (first, _), (second, _) = _records(ddp, optimizer, hooks, 2)
    for record in (first, second):
        assert 0 < record.newton_schulz_seconds < 60
        assert record.exchange_seconds == 0, "one rank exchanges nothing"


def test_laps_of_a_part_add_up_by_the_clock(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr(step_statistics.time, "perf_counter", lambda: next(clock))
    statistics = StepStatistics([False], torch.device("cpu"))
    with statistics.timing("newton_schulz"):
        pass
    with statistics.timing("exchange"):
        pass
    with statistics.timing("newton_schulz"):
        pass
    assert statistics.seconds("newton_schulz") == 6.0
    assert statistics.seconds("exchange") == 0.5
    statistics.restart()
    assert statistics.seconds("newton_schulz") == 0.0


def test_batches_of_both_groups_are_told_apart():
    statistics = StepStatistics([True, False, True], torch.device("cpu"))
    updates = torch.stack([torch.full((2, 5), float(value)) for value in (1, 2, 3)])
    statistics.add(updates, (0, 1, 2))
    dense, experts = statistics.sums.tolist()
    assert dense == pytest.approx([5 * 10 * 4, 10])
    assert experts == pytest.approx([5 * 10 * (1 + 9), 20])
