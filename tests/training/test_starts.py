"""What a start makes of what it finds: another run's checkpoint, another batch, masked batches.

The right values are those of a run that was not interrupted, of the schedule by samples, and of the
unmasked tokens alone. One rank; not exercised here: pipelines, ZeRO (``test_resume``).
"""

import math

import numpy as np
import pytest

from megatron_k2.flags.megatron import expand
from megatron_k2.run.iterations import last_iteration
from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.support.distributed import run_ranks
from tests.training.test_resume import FLAGS

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SAMPLES = 24
SHORT = f"""
    --micro-batch-size 1 --train-samples {SAMPLES} --lr-warmup-samples 4
    --lr-decay-samples {SAMPLES} --lr-wsd-decay-samples 8 --save-interval 1 --log-interval 1
""".split()
EOD = 1
LIMIT = 153_600
"""Bytes of a file on a disk that is full, a part of a checkpoint's."""
MASKED = ["--null-tokenizer-eod-id", str(EOD), "--eod-mask-loss", "--tokenizer-type"]
MASKED += ["NullTokenizer"]


def _batch(size):
    return ["--global-batch-size", str(size)]


def _write(prefix, documents):
    from megatron_k2.data.indexed import token_dtype, write_indexed

    write_indexed(prefix, [np.array(d, dtype="uint16") for d in documents], token_dtype(128))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("starts")
    mock = [word for word in FLAGS if word != "--mock-data"]
    mean = [word for word in expand(mock, cuda=False) if word != "--calculate-per-token-loss"]
    text = np.random.default_rng(0).integers(2, 128, (40, 65)).tolist()
    half = [doc[:20] + [EOD] * 45 for doc in text]
    _write(root / "empty", [[EOD] * 65] * 40)
    _write(root / "half", half)

    def case(save, *flags, base=FLAGS, **rest):
        return {"flags": [*base, *SHORT, *flags, "--save", str(root / save)], **rest}

    full = _batch(4)
    unwritten = f"of step 1 could not be written: .*__0_0.distcp stopped at {LIMIT:,} bytes: a file"
    from_a = ["--load", str(root / "a"), *_batch(4)]
    fine = ["--load", str(root / "a"), "--finetune", *_batch(4)]
    masked = ["--train-data-path", str(root / "empty"), *MASKED, *_batch(4)]
    cases = [
        case("a", *_batch(4), "--exit-interval", "2"),
        case("whole", *from_a),
        case("b", *from_a, "--exit-interval", "4"),
        case("b", *from_a),
        case("fine", *fine),
        case("fine in two", *fine, "--exit-interval", "3"),
        case("fine in two", *fine),
        case("smaller", "--load", str(root / "a"), *_batch(2)),
        case("larger", "--load", str(root / "a"), *_batch(8)),
        case("other", "--load", str(root / "a"), *_batch(3), error="made with 4.*3"),
        case("lr", *from_a, "--lr", "1e-3", error="--lr .*override-opt-param-scheduler"),
        case("lr", *from_a, "--lr", "1e-3", "--override-opt-param-scheduler"),
        case("full", *full, limit=LIMIT, error=unwritten),
        case("full beside", *full, "--async-save", limit=LIMIT, error=unwritten),
        case("full beside", *full, "--async-save"),
        case("masked", *masked, base=mock),
        case("masked mean", *masked, base=mean),
        case("half mean", "--train-data-path", str(root / "half"), *MASKED, *_batch(4), base=mean),
        case("half", "--train-data-path", str(root / "half"), *MASKED, *_batch(4), base=mock),
    ]
    run_ranks("tests.training.one_rank_worker", 1, cases, root / "logs")
    return root


def _facts(save):
    records = read_records(save / METRICS_FILE)
    return [(r.iteration, r.loss, r.learning_rate, r.grad_norm) for r in records]


@pytest.mark.parametrize(("interrupted", "whole"), [("b", "whole"), ("fine in two", "fine")])
def test_a_run_from_another_goes_on_from_its_own_last_step(root, interrupted, whole):
    assert _facts(root / interrupted) == _facts(root / whole)
    assert last_iteration(root / interrupted) == 6


@pytest.mark.parametrize(("save", "batch"), [("smaller", 2), ("larger", 8)])
def test_a_changed_batch_ends_at_exactly_the_samples_of_the_run(root, save, batch):
    records = read_records(root / save / METRICS_FILE)
    consumed = [record.consumed_samples for record in records]
    assert consumed == list(range(8 + batch, SAMPLES + 1, batch))
    for record in records:
        # Warm-up is over; flat, then a cosine over the last 8 samples, down to 0.1 of it.
        into = max(0, record.consumed_samples - (SAMPLES - 8)) / 8
        expected = 4e-4 + (2e-3 - 4e-4) * 0.5 * (1 + math.cos(math.pi * into))
        assert record.learning_rate == pytest.approx(expected, rel=1e-6)


def test_a_new_rate_is_taken_where_it_is_asked_for(root):
    assert read_records(root / "lr" / METRICS_FILE)[0].learning_rate == pytest.approx(1e-3)


def test_a_checkpoint_that_was_not_written_is_named_and_with_room_the_run_goes_on(root):
    """By a save that training waits for, and by one beside it; what is said is in the cases."""
    assert last_iteration(root / "full") == 0
    assert last_iteration(root / "full beside") == 6
    assert _facts(root / "full beside")[2:] == _facts(root / "whole")  # which begins at step 3


@pytest.mark.parametrize("save", ["masked", "masked mean"])
def test_a_batch_without_a_token_to_learn_is_skipped_and_weights_stay(root, save):
    from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
    from megatron_k2.run.iterations import iteration_directory

    records = read_records(root / save / METRICS_FILE)
    assert [record.is_skipped for record in records] == [True] * 6
    first, last = (MegatronSource(iteration_directory(root / save, n)) for n in (1, 6))
    assert first.shapes
    for name in first.shapes:
        assert np.array_equal(first.read(name).bits, last.read(name).bits), name
    log = (root / "logs" / "rank0.log").read_text()
    assert log.count("every token of the batch is masked; skipped, weights kept") == 6 * 2  # runs


@pytest.mark.parametrize("save", ["half", "half mean"])
def test_masked_tokens_among_others_do_not_count(root, save):
    """About ln 128 a token for random weights: over all tokens of the batch it would be a third."""
    records = read_records(root / save / METRICS_FILE)
    assert not any(record.is_skipped for record in records)
    assert records[0].loss == pytest.approx(math.log(128), rel=0.02)
