"""Fine-tuning killed and started again: to the last digit the losses of a run that was not.

Two ranks, ZeRO-1, a kill between two checkpoints; every later batch is the one it would have been.
``training/test_resume.py`` kills pretraining at more moments.
"""

import pytest

from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.sft.build_set import write_set
from tests.support.distributed import start_ranks, wait_for
from tests.training import test_resume as pretraining

pytestmark = [pytest.mark.dist, pytest.mark.slow]

MODULE = "megatron_k2.sft.train"
STEPS = 6
SIZE = """
    --preset k2-tiny --hidden-size 64 --ffn-hidden-size 96 --num-layers 3
    --moe-layer-freq ([0]*1+[1]*2) --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --vocab-size 128 --seq-length 64
    --max-position-embeddings 64
""".split()
FLAGS = f"""
    --global-batch-size 4 --train-samples {4 * STEPS} --lr 2e-3 --qk-clip-threshold 0.1
    --save-interval 2 --use-distributed-optimizer
""".split()


def test_a_killed_run_repeats_the_losses_of_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "MODULE", MODULE)
    chat_set = write_set(tmp_path / "set", num_samples=24)
    common = [*SIZE, *FLAGS, "--data", str(chat_set)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wait_for(start_ranks(MODULE, 2, [*common, "--save", str(whole)], whole / "t"), whole / "t")
    arguments = [*common, "--save", str(killed)]
    metrics = killed / METRICS_FILE
    pretraining._kill_one_when(
        lambda: len(read_records(metrics)) >= 3, arguments, killed / "t1", "gloo"
    )
    wait_for(start_ranks(MODULE, 2, arguments, killed / "t2"), killed / "t2")
    expected = pretraining._facts(whole)
    assert [fact[0] for fact in expected] == list(range(1, STEPS + 1))
    assert pretraining._facts(killed) == expected
    losses = [fact[1] for fact in expected]
    assert len(set(losses)) == STEPS, "each step its own packs"


def test_a_run_that_is_done_stays_done_and_other_data_is_refused(tmp_path):
    chat_set = write_set(tmp_path / "set", num_samples=24)
    run = [*SIZE, *FLAGS, "--data", str(chat_set), "--save", str(tmp_path / "run")]
    run += ["--train-samples", "8", "--lr-decay-samples", "8"]
    logs = tmp_path / "t"
    for _ in range(2):
        wait_for(start_ranks(MODULE, 1, run, logs), logs)
    assert "nothing to do" in (logs / "rank0.log").read_text()
    write_set(chat_set, num_samples=24, seed=1)
    processes = start_ranks(MODULE, 1, run, logs)
    assert processes[0].wait() == 2
    assert "was trained on other data" in (logs / "rank0.log").read_text()
