"""A phase that starts from the one before it: its optimizer to the bit, a rate of its own."""

from types import SimpleNamespace

import pytest
import torch

from megatron_k2.planning.phases import Phase
from megatron_k2.run.iterations import TRACKER
from megatron_k2.run.metrics import METRICS_FILE, read_records
from megatron_k2.training.phase_start import starts_here
from tests.support.distributed import BACKENDS, start_ranks, wait_for

MODULE = "tests.training.phase_worker"
MODEL = """
    --preset k2-tiny --mock-data --hidden-size 64 --ffn-hidden-size 96 --num-layers 3
    --moe-layer-freq ([0]*1+[1]*2) --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --vocab-size 128 --micro-batch-size 1
    --eval-iters 0 --save-interval 100 --qk-clip-threshold 0.1
""".split()
STEP = 256
FIRST = Phase("first", "", 4 * STEP, 64, STEP, 4e-3, 1e-3, "wsd", STEP, 2 * STEP)
SECOND = Phase("second", "", 3 * STEP, 128, STEP, 1e-3, 2e-4, "linear", has_yarn=True)
"""Half the sequences of twice the length, at the rate where the first ended."""
ZERO = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()


def _run(save, world_size, backend, *flags):
    logs = save / "t"
    arguments = [str(save / "state"), *MODEL, *flags, "--save", str(save)]
    wait_for(start_ranks(MODULE, world_size, arguments, logs, backend), logs)
    return read_records(save / METRICS_FILE)


def _state(save, name, rank):
    return torch.load(save / "state" / f"{name}{rank}.pt")


def _same(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("world_size", "optimizer"), [(1, []), (2, ZERO)], ids=["plain", "zero"])
def test_a_phase_goes_on_with_the_optimizers_state_and_its_own_rate(
    tmp_path, world_size, optimizer, backend
):
    first, second, fresh = (tmp_path / name for name in ("first", "second", "fresh"))
    before = _run(first, world_size, backend, *FIRST.megatron_flags(), *optimizer)
    flags = [*SECOND.megatron_flags(), *optimizer, "--yarn", "--pretrained-checkpoint", str(first)]
    kept = _run(second, world_size, backend, *flags, "--keep-optimizer")

    for rank in range(world_size):
        saved, loaded = _state(first, "saved", rank), _state(second, "loaded", rank)
        momenta = [s["momentum_buffer"] for s in saved["tensors"] if "momentum_buffer" in s]
        assert momenta
        assert all(m.abs().max() > 0 for m in momenta if m.numel())
        assert any("exp_avg_sq" in s for s in saved["tensors"])
        assert _same(saved["tensors"], loaded["tensors"])
        if world_size == 1:  # elsewhere a home alone keeps them up
            assert saved["peaks"].min() > 0
            assert torch.equal(saved["peaks"], loaded["peaks"])
        # The first step's rate and the curve's ends are the phase's, not those of the group saved.
        expected = [pytest.approx(rate) for rate in (SECOND.lr_at(0), SECOND.lr, SECOND.min_lr)]
        assert all(rates == expected for rates in loaded["rates"])
        assert all(rates != expected for rates in saved["rates"])

    # The curve goes on where it was, by the phase's own schedule from its own first step.
    assert before[-1].learning_rate == pytest.approx(SECOND.lr, rel=1e-6)
    assert [r.iteration for r in kept] == [1, 2, 3]
    assert [r.consumed_tokens for r in kept] == [STEP, 2 * STEP, 3 * STEP]
    planned = [SECOND.lr_at(n * STEP) for n in (1, 2, 3)]
    assert [r.learning_rate for r in kept] == pytest.approx(planned, rel=1e-6)
    if optimizer:
        return
    empty = _run(fresh, world_size, backend, *flags)  # the weights alone
    assert not _same(_state(first, "saved", 0)["tensors"], _state(fresh, "loaded", 0)["tensors"])
    assert kept[0].loss == empty[0].loss
    assert kept[1].loss != empty[1].loss
    assert [r.learning_rate for r in kept] == [r.learning_rate for r in empty]


def test_a_run_with_a_checkpoint_of_its_own_resumes_instead(tmp_path):
    args = SimpleNamespace(
        keep_optimizer=True, pretrained_checkpoint="first", load=str(tmp_path), save=None
    )
    assert starts_here(args)
    (tmp_path / TRACKER).write_text("2")
    assert not starts_here(args)
