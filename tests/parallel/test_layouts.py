"""Every parallel layout against one rank, through Megatron's own training loop.

(i) With the same gradients and maximum logits injected, the optimizer leaves every weight and
every momentum bit-equal: it only moves data, and orthogonalises whole matrices.
(ii) End to end over five steps: losses within 1e-6 relative, weights within 1e-6 absolute.
Reductions run in another order (a few ulp), which Newton-Schulz amplifies in the directions where
a gradient is nearly singular; a learning rate of the report's size (2e-4) keeps that below 1e-6. A
route that flipped on rounding would not be rounding any more, so the smallest gap between chosen
and rejected scores is asserted to be far above the differences.

Not exercised: bf16, dropout, more than four ranks.
"""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.support.distributed import BACKENDS, run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 5
BATCH = 4
BATCHES = {2: BATCH, 3: 6, 4: 12}
"""Sequences a step by the number of ranks: at least two for a rank, so that gradients add up."""
MODEL = f"""
    --preset k2-tiny --mock-data --hidden-size 64 --ffn-hidden-size 96 --num-layers 4
    --q-lora-rank 32 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --vocab-size 128 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size {BATCH}
    --train-samples {BATCH * STEPS} --lr 2e-4 --min-lr 2e-4 --lr-warmup-samples 0
    --lr-decay-samples {BATCH * STEPS} --lr-wsd-decay-samples 4 --qk-clip-threshold 20
    --eval-iters 0 --log-interval 1 --save-interval {STEPS} --seed 26
""".split()


def batch_of(size: int) -> list[str]:
    """``size`` sequences a step, over as many steps."""
    samples = str(size * STEPS)
    return [
        *("--global-batch-size", str(size)),
        *("--train-samples", samples, "--lr-decay-samples", samples),
    ]


TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1".split()
EP2 = "--expert-model-parallel-size 2".split()
PP2 = "--pipeline-model-parallel-size 2".split()
CP2 = "--context-parallel-size 2".split()
VPP2 = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
ADAM = "--optimizer adam".split()
ZERO = "--use-distributed-optimizer".split()
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000".split()

PER_HEAD = ["--muon-per-head"]

LAYOUTS = {
    2: {
        "TP2+SP": TP2,
        "EP2 all-to-all": EP2,
        "EP2 all-gather": [*EP2, "--moe-token-dispatcher-type", "allgather"],
        "PP2": PP2,
        "PP2xVPP2": VPP2,
        "DP2": [],
        "CP2": CP2,
        "DP2 distributed AdamW": [*ADAM, *ZERO],
        "ZeRO DP2": ZERO,
        "ZeRO DP2 overlap, many buckets": [*ZERO, *OVERLAP],
        "ZeRO TP2": [*ZERO, *TP2],
        "ZeRO EP2": [*ZERO, *EP2],
        "ZeRO PP2": [*ZERO, *PP2],
        "ZeRO PP2xVPP2 overlap": [*ZERO, *VPP2, *OVERLAP],
        "ZeRO CP2": [*ZERO, *CP2],
    },
    3: {"ZeRO DP3, ragged": [*ZERO, *OVERLAP]},
    4: {
        "TP2xPP2": [*TP2, *PP2],
        "TP2xEP2": [*TP2, *EP2],
        "PP2xEP2": [*PP2, *EP2],
        "ZeRO TP2xDP2": [*ZERO, *TP2],
        "ZeRO EP2xDP2": [*ZERO, *EP2, *OVERLAP],
        "ZeRO TP2xDP2 per head": [*ZERO, *TP2, *PER_HEAD],
    },
}
ALL = [name for layouts in LAYOUTS.values() for name in layouts]


def _case(
    root: Path, name: str, base: Path | None, flags: list[str], inject: bool, batch: int = BATCH
) -> dict:
    """With gradients injected their number is of no account, so that there is one of each kind."""
    save = _directory(root, name, "injected" if inject else "real")
    load = ["--load", str(base), "--finetune"] if base else []
    return {
        "flags": [*MODEL, *batch_of(batch), *flags, "--save", str(save), *load],
        "inject": inject,
    }


@pytest.fixture(scope="module", params=BACKENDS)
def runs(request, tmp_path_factory) -> Path:
    """All cases, four start-ups in all; every layout starts from the same one-rank checkpoint."""
    root = tmp_path_factory.mktemp("layouts")
    base = _case(root, "base", None, ["--train-samples", str(BATCH), "--save-interval", "1"], False)
    start = _directory(root, "base", "real")
    references = [
        _case(root, _reference("", world_size), start, [], False, batch) | {"watch_margin": True}
        for world_size, batch in BATCHES.items()
    ]
    for kind, flags in {"": [], "AdamW": ADAM, "per head": PER_HEAD}.items():
        references.append(_case(root, _reference(kind), start, flags, True, 1))
    references.append(_case(root, _reference("AdamW", 2), start, ADAM, False, BATCHES[2]))
    references.append(_case(root, _reference("per head", 4), start, PER_HEAD, False, BATCHES[4]))
    run_ranks("tests.parallel.worker", 1, [base, *references], root / "logs1", request.param)
    for world_size, layouts in LAYOUTS.items():
        cases = [
            _case(root, name, start, flags, inject, world_size if inject else BATCHES[world_size])
            for name, flags in layouts.items()
            for inject in (False, True)
        ]
        logs = root / f"logs{world_size}"
        run_ranks("tests.parallel.worker", world_size, cases, logs, request.param)
    return root


def _directory(root: Path, name: str, kind: str) -> Path:
    return root / re.sub(r"\W", "_", f"{name} {kind}")


def _reference(layout: str, world_size: int | None = None) -> str:
    """One rank's run for a layout: with its batch, or of injected gradients."""
    kind = next((kind for kind in ("AdamW", "per head") if kind in layout), "")
    batch = f"batch {BATCHES[world_size]}" if world_size else ""
    return f"one rank {kind} {batch}"


def _world_size(layout: str) -> int:
    return next(size for size, layouts in LAYOUTS.items() if layout in layouts)


def _real(runs: Path, layout: str) -> tuple[Path, Path]:
    """Directories of a layout's run and of one rank's."""
    reference = _reference(layout, _world_size(layout))
    return _directory(runs, layout, "real"), _directory(runs, reference, "real")


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and momentum of the last checkpoint, by global name."""
    iteration = directory / f"iter_{STEPS:07d}"
    metadata = FileSystemReader(iteration).read_metadata().state_dict_metadata
    is_wanted = re.compile(r"(^|momentum_buffer\.)(decoder|embedding|output_layer)\.")
    state = {
        key: torch.empty(entry.size)
        for key, entry in metadata.items()
        if is_wanted.search(key) and hasattr(entry, "size")
    }
    _load(state, iteration)
    return {key.split("optimizer.state.")[-1]: tensor for key, tensor in state.items()}


def _load(state: dict[str, torch.Tensor], iteration: Path) -> None:
    with warnings.catch_warnings():  # that torch.distributed is off is the point
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=iteration, no_dist=True)


def _largest_differences(found: Path, expected: Path) -> dict[str, float]:
    a, b = _tensors(found), _tensors(expected)
    shared = [key for key in b if key in a]
    assert len(shared) == len(b), f"not in {found.name}: {sorted(set(b) - set(a))}"
    return {key: (a[key] - b[key]).abs().max().item() for key in shared}


@pytest.mark.parametrize("layout", ALL)
def test_injected_gradients_leave_weights_and_momentum_bit_equal(runs, layout):
    found, expected = (_directory(runs, n, "injected") for n in (layout, _reference(layout)))
    differences = _largest_differences(found, expected)
    moved = {key: d for key, d in differences.items() if d > 0 and "expert_bias" not in key}
    assert not moved, f"{layout}: {len(moved)} of {len(differences)} differ: {moved}"


@pytest.mark.parametrize("layout", ALL)
def test_five_steps_equal_one_rank(runs, layout, record_property):
    found, expected = _real(runs, layout)
    losses = [[r.loss for r in read_records(d / METRICS_FILE)] for d in (found, expected)]
    relative = [abs(a - b) / b for a, b in zip(*losses, strict=True)]
    assert max(relative) < 1e-6, f"{layout}: losses differ by {max(relative):.1e}: {losses}"
    differences = {
        key: difference
        for key, difference in _largest_differences(found, expected).items()
        if not key.startswith("momentum_buffer")
    }
    worst = max(differences, key=lambda key: differences[key])
    record_property("difference", differences[worst])
    record_property("bar", 1e-6)
    assert differences[worst] < 1e-6, f"{layout}: {worst} differs by {differences[worst]:.1e}"


@pytest.mark.parametrize("layout", [name for name in ALL if "AdamW" not in name])
def test_both_gradient_norms_equal_one_rank(runs, layout):
    """Each element counted once, whatever is replicated over whom."""
    records = [read_records(directory / METRICS_FILE) for directory in _real(runs, layout)]
    for found, expected in zip(*records, strict=True):
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert found.adamw_grad_norm == pytest.approx(expected.adamw_grad_norm, rel=1e-5)
        assert 0 < expected.adamw_grad_norm < expected.grad_norm


@pytest.mark.parametrize("world_size", BATCHES)
def test_no_route_is_close_enough_to_flip_on_rounding(runs, world_size):
    reference = _directory(runs, _reference("", world_size), "real")
    margin = json.loads((reference / "margin.json").read_text())
    assert margin > 1e-6, f"smallest gap between chosen and rejected scores: {margin:.1e}"


def test_a_step_changes_far_more_than_the_tolerance(runs):
    """The bounds above can fail: five steps move the weights a hundred times further."""
    key = "decoder.layers.1.mlp.router.weight"
    before = {key: torch.empty(8, 64)}
    _load(before, _directory(runs, "base", "real") / "iter_0000001")
    after = _tensors(_directory(runs, _reference("", 2), "real"))
    assert (after[key] - before[key]).abs().max() > 1e-4
