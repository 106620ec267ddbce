"""A rank killed at any moment, the same command again: the losses of a run that was never killed.

Compared to the last digit, as ``metrics.jsonl`` holds them. Two ranks, data parallel, without and
with ZeRO, one sequence of kills: before any checkpoint exists, while one is being written, and
between two.
Not exercised: a kill of the machine (fsync is what we rely on there), asynchronous saves.
"""

import signal
import time

import pytest

from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.support.distributed import BACKENDS, end, start_ranks, wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

MODULE = "megatron_k2.training.pretrain"
STEPS = 9
FLAGS = f"""
    --preset k2-tiny --mock-data --hidden-size 64 --ffn-hidden-size 96 --num-layers 3
    --moe-layer-freq ([0]*1+[1]*2) --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --vocab-size 128 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 4
    --train-samples {4 * STEPS} --lr 2e-3 --lr-warmup-samples 4 --lr-decay-samples {4 * STEPS}
    --lr-wsd-decay-samples 8 --qk-clip-threshold 0.1 --eval-iters 0 --save-interval 3
""".split()


def _kill_one_when(condition, arguments, log_dir, backend, timeout=300.0):
    """Start two ranks, SIGKILL the second as soon as ``condition()`` holds, end the first."""
    processes = start_ranks(MODULE, 2, arguments, log_dir, backend)
    try:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "the moment to kill never came"
            early = [p.returncode for p in processes if p.poll() is not None]
            assert not early, f"ended by itself: {early}\n{(log_dir / 'rank0.log').read_text()}"
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGKILL)
    finally:
        for process in processes:
            end(process)


def _facts(save):
    """What must be equal; timings are not."""
    return [
        (
            r.iteration,
            r.loss,
            r.learning_rate,
            r.grad_norm,
            r.max_logit_per_layer,
            r.num_clipped_heads,
            r.load_max_over_mean_per_layer,
        )
        for r in read_records(save / METRICS_FILE)
    ]


ZERO = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", [[], ZERO], ids=["plain", "zero"])
def test_a_killed_run_repeats_the_losses_of_one_that_was_not(tmp_path, optimizer, backend):
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run(arguments, log_dir):
        wait_for(start_ranks(MODULE, 2, arguments, log_dir, backend), log_dir)

    run([*FLAGS, *optimizer, "--save", str(whole)], whole / "t")
    arguments = [*FLAGS, *optimizer, "--save", str(killed)]
    metrics = killed / METRICS_FILE

    def steps_done():
        return len(read_records(metrics))

    _kill_one_when(lambda: steps_done() >= 2, arguments, killed / "t1", backend)
    checkpoint = killed / "iter_0000003"
    _kill_one_when(checkpoint.exists, arguments, killed / "t2", backend)
    _kill_one_when(lambda: steps_done() >= 5, arguments, killed / "t3", backend)
    run(arguments, killed / "t4")

    expected = _facts(whole)
    assert [fact[0] for fact in expected] == list(range(1, STEPS + 1))
    assert sum(fact[5] for fact in expected) > 0, "no head was clipped: the test is too tame"
    assert _facts(killed) == expected


def test_a_run_resumed_without_its_optimizer_state_is_told_apart(tmp_path):
    """The comparison above can fail: momentum left behind changes the very next loss."""
    first, second = tmp_path / "first", tmp_path / "second"
    half = ["--exit-interval", "6"]
    wait_for(
        start_ranks(MODULE, 1, [*FLAGS, *half, "--save", str(first)], first / "t"), first / "t"
    )
    cold = ["--load", str(first), "--no-load-optim", "--save", str(second)]
    wait_for(start_ranks(MODULE, 1, [*FLAGS, *cold], second / "t"), second / "t")
    warm = tmp_path / "warm"
    hot = ["--load", str(first), "--save", str(warm)]
    wait_for(start_ranks(MODULE, 1, [*FLAGS, *hot], warm / "t"), warm / "t")
    assert _facts(second)[0] == _facts(warm)[0]
    assert _facts(second)[1][1] != _facts(warm)[1][1]
