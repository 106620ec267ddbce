"""A spiking loss: found against a slow oracle, passed by a rollback, repeated by nobody.

The run that goes back is compared, to the last digit, with one that was told from its first step to
leave those batches out. Two pipeline ranks of two virtual stages each: the loss is known on one of
them alone, and Megatron's own skip of a batch fails there.
"""

import random
from types import SimpleNamespace

import pytest

from megatron_k2.errors import UserError
from megatron_k2.launch import local
from megatron_k2.launch.graph import places, run_chain
from megatron_k2.launch.overrides import apply
from megatron_k2.recipes import get_recipe
from megatron_k2.run.iterations import TRACKER, whole_iterations
from megatron_k2.run.metrics import METRICS_FILE, read_records
from megatron_k2.run.rollback import (
    ASIDE,
    ROLLBACKS,
    Rollback,
    plan_rollback,
    read_rollbacks,
    roll_back,
)
from megatron_k2.run.spikes import MINIMUM, WINDOW, Spike, find_spike
from megatron_k2.training.spike_watch import EXIT_CODE, meet_spike, skip_batch
from tests.support.distributed import BACKENDS, start_ranks, wait_for

LEAST = 0.5


def _noisy(seed, length=WINDOW, sigma=0.05, slope=0.0):
    rng = random.Random(seed)
    return [3.0 - slope * i + rng.gauss(0, sigma) for i in range(length)]


def _oracle(loss, before):
    """By sorting: how far ``loss`` lies over the middle, in middle moves, and in nats."""

    if len(before) < 8:
        return False

    def middle(values):
        ordered = sorted(values)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    over = loss - middle(before)
    moves = [abs(before[i] - before[i - 1]) for i in range(1, len(before))]
    return over > LEAST and over > 5 * middle(moves)


def _about_the_median(loss, before):
    """Wrong: the noise taken as the deviation from the median, which a falling loss has much of."""
    ordered = sorted(before)
    middle = ordered[len(ordered) // 2]
    deviation = sorted(abs(x - middle) for x in before)[len(before) // 2]
    return loss - middle > max(LEAST, 5 * deviation)


@pytest.mark.parametrize("slope", [0.0, 0.05])
@pytest.mark.parametrize("sigma", [0.005, 0.05, 0.5])
@pytest.mark.parametrize("length", [0, MINIMUM - 1, MINIMUM, 33, WINDOW])
def test_a_spike_is_what_the_oracle_says(length, sigma, slope):
    for seed in range(20):
        before = _noisy(seed, length, sigma, slope)
        for height in (-3.0, 0.0, 0.45, 0.55, 1.0, 2.0, 6.0):
            loss = 3.0 + height
            found = find_spike(9, loss, before, LEAST)
            assert (found is not None) == _oracle(loss, before)
            if found is not None:
                assert f"{loss:.4f}" in str(found)
                assert found.loss - found.median > found.limit >= LEAST


def test_a_falling_loss_does_not_hide_a_spike():
    before = _noisy(0, slope=0.05)
    loss = before[-1] + 4.0
    assert find_spike(9, loss, before, LEAST)
    assert not _about_the_median(loss, before)


def test_noise_is_no_spike():
    losses = _noisy(3, 2000, sigma=0.4)
    found = [
        i for i in range(WINDOW, 2000) if find_spike(i, losses[i], losses[i - WINDOW : i], 0.1)
    ]
    assert found == []


def test_a_rollback_goes_to_before_the_margin_and_not_twice_to_one_place():
    spike = Spike(57, 5.0, 3.0, 0.5)
    plan = plan_rollback(spike, 2, [30, 40, 50, 54, 55, 60], [])
    assert (plan.back_to, plan.skipped) == (54, (55, 56, 57, 58, 59))
    assert plan_rollback(spike, 2, [55, 60], []) is None
    earlier = Rollback(52, 50, (52,), 5.0, 3.0)
    assert plan_rollback(spike, 2, [50, 54], [earlier]).back_to == 54
    assert plan_rollback(spike, 2, [50, 55], [earlier]) is None  # the batch was not the cause


def test_what_is_on_disk_after_a_rollback(tmp_path):
    for step in (3, 6, 9):
        (tmp_path / f"iter_{step:07d}").mkdir()
        (tmp_path / f"iter_{step:07d}" / "metadata.json").touch()
    (tmp_path / "iter_0000012").mkdir()  # half written
    assert whole_iterations(tmp_path) == [3, 6, 9]
    (tmp_path / TRACKER).write_text("9")
    first = Rollback(8, 6, (7, 8, 9), 5.0, 3.0)
    for _ in range(2):  # a kill before the line was written repeats it
        roll_back(tmp_path, first)
    assert (tmp_path / TRACKER).read_text() == "6"
    assert whole_iterations(tmp_path) == [3, 6]
    assert sorted(p.name for p in (tmp_path / ASIDE).iterdir()) == ["iter_0000009", "iter_0000012"]
    assert read_rollbacks(tmp_path) == [first, first]
    (tmp_path / ROLLBACKS).write_text("{")
    with pytest.raises(UserError, match="is not what a run wrote"):
        read_rollbacks(tmp_path)


def test_a_batch_is_drawn_of_every_virtual_stage_where_megatron_fails():
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.core.rerun_state_machine import RerunDataIterator, destroy_rerun_state_machine
    from megatron.training import global_vars, training

    from tests.support.single_rank import one_rank

    def iterators():
        return [RerunDataIterator(iter([{"tokens": None}] * 3 + [4])) for _ in range(2)]

    args = SimpleNamespace(hybrid_context_parallel=False)
    calculator.init_num_microbatches_calculator(0, None, 12, 4, 1)
    try:
        with one_rank():
            global_vars.set_args(args)
            stages = iterators()
            skip_batch(stages)
            assert [next(stage) for stage in stages] == [4, 4]
            skip_batch(None)  # the middle of a pipeline
            for held in (iterators(), None):
                destroy_rerun_state_machine()
                with pytest.raises(TypeError):  # when upstream has mended it, ours goes
                    training.dummy_train_step(held)
    finally:
        calculator.unset_num_microbatches_calculator()
        destroy_rerun_state_machine()
        global_vars._GLOBAL_ARGS = None


def test_a_chain_does_not_go_on_from_a_run_that_ended_early(tmp_path, capsys):
    runs = places(
        [get_recipe("kimi_k2_pretrain_cpu"), get_recipe("kimi_k2_anneal_4k_cpu")], tmp_path
    )
    started = []

    def train(recipe, save, start_from, changed):
        started.append(recipe.name)
        return 0

    assert run_chain(runs, [], train) == 1
    assert started == ["kimi_k2_pretrain_cpu"]
    assert "ended early" in capsys.readouterr().out


def test_here_a_run_is_started_again_after_each_rollback_and_not_without_one(tmp_path, monkeypatch):
    codes, started = [0, 0, 0, EXIT_CODE], []

    def launch(module, flags, num_processes):
        started.append(flags)
        if len(started) < 3:
            roll_back(tmp_path, Rollback(10 * len(started), 8, (10,), 5.0, 3.0))
        return codes[len(started) - 1]

    monkeypatch.setattr(local, "launch", launch)
    recipe = get_recipe("kimi_k2_pretrain_cpu")
    assert local.run_local(recipe, str(tmp_path), None, []) == 0
    assert len(started) == 3
    assert started[0] == started[1] == started[2]
    assert local.run_local(recipe, str(tmp_path), None, []) == EXIT_CODE


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("loss.on_spike=skip", "off, warn, stop, rollback"),
        ("loss.spike_nats=0", "nats above 0"),
        ("loss.spike_margin=-1", "steps from 0"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(assignment, words):
    with pytest.raises(UserError, match=words):
        apply(get_recipe("kimi_k2_pretrain_256gpu_h800"), [assignment])


MODULE = "tests.training.spiked_worker"
STEPS, SPOILED = 14, 11
FLAGS = f"""
    --preset k2-tiny --mock-data --hidden-size 64 --ffn-hidden-size 96 --num-layers 4
    --moe-layer-freq ([0]*1+[1]*3) --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --vocab-size 128 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 4
    --train-samples {4 * STEPS} --lr 8e-3 --lr-warmup-samples 4 --lr-decay-samples {4 * STEPS}
    --lr-wsd-decay-samples 8 --qk-clip-threshold 0.1 --eval-iters 0 --save-interval 4
    --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2
    --spike-margin 1
""".split()


def _facts(save):
    return {
        r.iteration: (r.loss, r.learning_rate, r.grad_norm, r.max_logit_per_layer)
        for r in read_records(save / METRICS_FILE)
    }


def _run(save, attempt, backend, *flags):
    """Start both ranks; their exit codes."""
    logs = save / attempt
    ranks = start_ranks(
        MODULE, 2, [str(SPOILED), *FLAGS, *flags, "--save", str(save)], logs, backend
    )
    try:
        wait_for(ranks, logs)
    except AssertionError:
        if EXIT_CODE not in [rank.poll() for rank in ranks]:
            raise
        return EXIT_CODE
    return 0


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollback_equals_a_run_that_never_saw_those_batches(tmp_path, backend):
    told, save = tmp_path / "told", tmp_path / "save"
    assert _run(told, "t", backend, "--iterations-to-skip", "10", "11", "12") == 0
    expected = _facts(told)
    assert list(expected) == [*range(1, 10), 13, 14]

    # Stopping leaves the checkpoint before the spike, not the one that was due at step 12.
    assert _run(save, "t1", backend, "--on-spike", "stop") == EXIT_CODE
    assert ((save / TRACKER).read_text(), whole_iterations(save)) == ("8", [4, 8])
    assert max(_facts(save)) == SPOILED
    assert {i: _facts(save)[i] for i in range(1, 10)} == {i: expected[i] for i in range(1, 10)}

    # Two steps on, the resumed run sees it by the losses of the run before it.
    assert _run(save, "t2", backend, "--on-spike", "rollback") == 0
    (line,) = read_rollbacks(save)
    assert (line.spike, line.back_to, line.skipped) == (SPOILED, 8, (10, 11, 12))
    assert _facts(save) != expected
    assert _run(save, "t3", backend, "--on-spike", "rollback") == 0
    assert _facts(save) == expected
    assert read_rollbacks(save) == [line]


def test_a_warning_is_said_and_nothing_else():
    said = []
    meet_spike(SimpleNamespace(on_spike="warn"), Spike(57, 5.0, 3.0, 0.5), said.append)
    assert said == [
        "step 57: loss 5.0000 is 2.000 nats over the median 3.0000 of the steps before it (limit "
        "0.500); going on (--on-spike warn)"
    ]
