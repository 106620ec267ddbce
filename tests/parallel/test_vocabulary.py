"""A vocabulary that does not divide by TP: TP2's losses are TP1's, from a fresh start and a resume.

127 ids, which TP2 pads to 128; with and without multi-token prediction, fused cross entropy and
ZeRO. The bound is that of ``test_layouts``. Not exercised: CUDA, where Megatron draws each shard
from a generator of its own, so that only a resume can agree.
"""

import pytest

from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.parallel.test_layouts import BATCH, MODEL, TP2
from tests.support.distributed import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FUSED = ["--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native"]
KINDS = {
    "plain": [],
    "fused": FUSED,
    "mtp over ZeRO": ["--mtp-num-layers", "1", "--use-distributed-optimizer"],
    "divides": ["--vocab-size", "128"],
}
STEPS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabulary")

    def case(save: str, kind: str, *flags: str) -> dict:
        samples = ["--train-samples", str(BATCH * STEPS), "--save-interval", "1"]
        flags = (*MODEL, "--vocab-size", "127", *KINDS[kind], *samples, *flags)
        return {"flags": [*flags, "--save", str(root / save)]}

    one = [case(f"{kind}1", kind) for kind in KINDS]
    run_ranks("tests.parallel.worker", 1, one, root / "logs1")
    two = [case(f"{kind}2", kind, *TP2) for kind in KINDS]
    start = ["--load", str(root / "mtp over ZeRO1"), "--ckpt-step", "1"]
    two.append(case("resumed", "mtp over ZeRO", *TP2, *start))
    run_ranks("tests.parallel.worker", 2, two, root / "logs2")
    return root


def _losses(save):
    return [record.loss for record in read_records(save / METRICS_FILE)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_start_at_tp2_has_the_losses_of_tp1(runs, kind):
    found, expected = _losses(runs / f"{kind}2"), _losses(runs / f"{kind}1")
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_of_tp1_goes_on_at_tp2(runs):
    assert _losses(runs / "resumed") == pytest.approx(
        _losses(runs / "mtp over ZeRO1")[1:], rel=1e-6
    )
