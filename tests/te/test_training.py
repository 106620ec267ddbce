"""Megatron's loop and MuonClip over the TE spec: losses, checkpoints, FP8 primary weights.

One process, over the stand-ins (TE's AdamW among them). Losses and S_max against the local modules
in fp32 over four steps: sums run in another order, 1e-5 relative. Not exercised: more than one
rank, Megatron's overlap flags with TE.
"""

import pytest
import torch

from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.support.distributed import BACKENDS, run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TAU, STEPS = 0.02, 4
MODEL = """
    --preset k2-tiny --mock-data --num-layers 3 --num-experts 8 --moe-layer-freq ([0]*1+[1]*2)
    --vocab-size 128 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1
    --global-batch-size 2 --lr 2e-4 --min-lr 2e-4 --lr-warmup-samples 0 --lr-decay-samples 8
    --lr-wsd-decay-samples 2 --eval-iters 0 --log-interval 1 --save-interval 2 --seed 26
    --attention-backend unfused --muonclip-dtype fp32
""".split()
TE = "--transformer-impl transformer_engine --moe-grouped-gemm".split()
ZERO = ["--use-distributed-optimizer"]
LENIENT = ["--dist-ckpt-strictness", "log_all"]
"""A local checkpoint has none of the extra states that TE would load."""
FP8 = "--bf16 --fp8-compute blockwise --fp8-param-gather".split()


def _case(root, name, *flags, steps=STEPS, load=None, record=False):
    samples = ["--train-samples", str(2 * STEPS), "--exit-interval", str(steps)]
    places = ["--save", str(root / name), *(["--load", str(root / load)] if load else [])]
    clip = ["--qk-clip-threshold", str(TAU)]
    return {
        "flags": [*MODEL, *samples, *clip, *places, *flags],
        "record": str(root / f"{name}.pt") if record else None,
    }


@pytest.fixture(scope="module", params=BACKENDS)
def root(request, _transformer_engine, tmp_path_factory):
    root = tmp_path_factory.mktemp("te_training")
    start = ["--load", str(root / "start"), "--finetune"]  # the two draw weights in another order
    half = STEPS // 2
    cases = [
        _case(root, "start", *ZERO, "--save-interval", "1", steps=1),
        _case(root, "local", *ZERO, *start),
        _case(root, "te", *ZERO, *TE, *start, *LENIENT),
        _case(root, "local half", *ZERO, *start, steps=half),
        _case(root, "te half", *ZERO, *TE, *start, *LENIENT, steps=half),
        _case(root, "local then te", *ZERO, *TE, *LENIENT, load="local half"),
        _case(root, "te then local", *ZERO, load="te half"),
        _case(root, "fp8", *ZERO, *TE, *FP8, record=True, steps=1),
    ]
    run_ranks("tests.te.training_worker", 1, cases, root / "logs", request.param)
    return root


def _records(root, name):
    return read_records(root / name / METRICS_FILE)


def test_losses_and_maximum_logits_equal_the_local_modules(root):
    local, te = _records(root, "local"), _records(root, "te")
    assert len(te) == len(local) == STEPS
    for a, b in zip(local, te, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.max_logit_per_layer == pytest.approx(a.max_logit_per_layer, rel=1e-5)
        assert b.num_clipped_heads == a.num_clipped_heads
    assert any(record.num_clipped_heads for record in te)


@pytest.mark.parametrize("name", ["local then te", "te then local"])
def test_either_implementation_goes_on_from_the_others_checkpoint(root, name):
    """Weights, momentum and AdamW's moments: the losses of the steps after the change say so."""
    expected, found = _records(root, "local")[STEPS // 2 :], _records(root, name)
    assert [record.iteration for record in found] == [record.iteration for record in expected]
    for a, b in zip(expected, found, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.max_logit_per_layer == pytest.approx(a.max_logit_per_layer, rel=1e-4)


QUANTISED = (torch.float8_e4m3fn, 448.0, 2, 0.0, False)
"""E4M3 in 128x128 blocks with fp32 scales."""


def test_fp8_primary_weights_are_the_clipped_masters_rounded_as_bf16_weights_would_be(root):
    """TE rounds a master to bf16 before FP8, so that it equals what a bf16 weight would give."""
    from tests.te.standin.quantization import block_codes

    record = torch.load(root / "fp8.pt")
    assert len(record["weights"]) > 20
    assert not any("router" in name or "output_layer" in name for name in record["weights"])
    num_unrounded = 0
    for name, weight in record["weights"].items():
        master = record["masters"][name].view(weight["shape"])
        codes, scale_inv = block_codes(master.bfloat16(), *QUANTISED)
        assert torch.equal(weight["codes"], codes), name
        rows, cols = scale_inv.shape
        assert torch.equal(weight["scale_inv"][:rows, :cols], scale_inv), name
        num_unrounded += (block_codes(master, *QUANTISED)[0] != codes).sum().item()
    assert num_unrounded > 100, "masters without the rounding would be seen"


def test_the_clip_scales_rows_of_masters_and_not_of_fp8_weights(root):
    """Codes scaled and quantised again, as a clip on the FP8 weights would do, are other codes."""
    from tests.te.standin.quantization import block_codes

    record = torch.load(root / "fp8.pt")
    scaled = {name: pair for name, pair in record["clipped"].items() if not torch.equal(*pair)}
    assert len(scaled) > 2
    assert all(name.endswith("_up_proj.weight") for name in scaled)
    num_different = 0
    for name, (before, after) in scaled.items():
        weight = record["weights"][name]
        rows, cols = weight["shape"]
        assert torch.equal(
            weight["codes"], block_codes(after.view(rows, cols).bfloat16(), *QUANTISED)[0]
        )
        codes, scale_inv = block_codes(before.view(rows, cols).bfloat16(), *QUANTISED)
        per_weight = scale_inv.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        value = codes.view(torch.float8_e4m3fn).float() * per_weight
        factor = (after / before).view(rows, cols).nan_to_num(1)[:, :1]
        num_different += (
            (block_codes(value * factor, *QUANTISED)[0] != weight["codes"]).sum().item()
        )
    assert num_different > 100
