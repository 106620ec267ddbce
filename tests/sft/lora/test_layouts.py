"""Adapters at every parallel layout against one rank, through Megatron's own training loop.

As ``tests/parallel/test_layouts.py`` does for whole models, from the same checkpoint of a frozen
base: with injected gradients MuonClip and AdamW leave every factor and momentum bit-equal; end to
end over five steps losses agree to 1e-6 and factors to 1e-6 of the steps' size. The wrong variant
begins experts' adapters by their place on a rank, as a table shared by EP rank would.

Not exercised: bf16, Transformer Engine, more than four ranks.
"""

import re
from pathlib import Path

import pytest
import torch

from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.parallel import test_layouts as whole
from tests.support.distributed import BACKENDS, run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LORA = "--lora-rank 8 --lora-alpha 16 --moe-router-load-balancing-type none".split()
RECOMPUTE = (
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
)
MTP = ["--mtp-num-layers", "1"]
LAYOUTS = {
    2: {
        "TP2+SP": whole.TP2,
        "EP2": whole.EP2,
        "TP2, experts too": [*whole.TP2[:3], "--expert-tensor-parallel-size", "2"],
        "PP2xVPP2, whole layers again": [*whole.VPP2, *RECOMPUTE],
        "DP2": [],
        "ZeRO DP2": whole.ZERO,
        "ZeRO DP2 overlap": [*whole.ZERO, *whole.OVERLAP],
        "ZeRO EP2": [*whole.ZERO, *whole.EP2],
        "ZeRO DP2 AdamW": [*whole.ZERO, *whole.ADAM],
    },
    4: {
        "EP4": ["--expert-model-parallel-size", "4"],
        "ZeRO TP2xDP2": [*whole.ZERO, *whole.TP2],
        "TP2xPP2": [*whole.TP2, *whole.PP2],
    },
}
ALL = [name for layouts in LAYOUTS.values() for name in layouts]
WRONG = "EP2, experts named by rank"
BATCH = 4


def _directory(root: Path, name: str, kind: str) -> Path:
    return root / re.sub(r"\W", "_", f"{name} {kind}")


def _case(root: Path, name: str, base: Path, flags: list[str], *, inject: bool, **more) -> dict:
    batch = whole.batch_of(1 if inject and name.startswith("one rank") else BATCH)
    save = _directory(root, name, "injected" if inject else "real")
    own = [*whole.MODEL, *batch, *LORA, *flags]
    own += ["--lora-base", str(base / "iter_0000001"), "--save", str(save)]
    if name == WRONG:
        more["experts_named_by_rank"] = True
    return {"flags": own, "inject": inject, **more}


@pytest.fixture(scope="module", params=BACKENDS)
def runs(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    base = _directory(root, "base", "real")
    once = "--train-samples 1 --save-interval 1".split()
    flags = [*whole.MODEL, *whole.batch_of(1), *once, "--save", str(base)]
    first = {"flags": flags, "inject": False}
    cases = [first]
    for kind, flags in {"": [], "AdamW": whole.ADAM}.items():
        cases += [_case(root, f"one rank {kind}", base, flags, inject=i) for i in (False, True)]
    run_ranks("tests.parallel.worker", 1, cases, root / "logs1", request.param)
    for world_size, layouts in LAYOUTS.items():
        cases = [
            _case(root, name, base, flags, inject=inject)
            for name, flags in layouts.items()
            for inject in (False, True)
        ]
        if world_size == 2:
            cases.append(_case(root, WRONG, base, whole.EP2, inject=False))
            cases += _resumed(root, base)
        logs = root / f"logs{world_size}"
        run_ranks("tests.parallel.worker", world_size, cases, logs, request.param)
    return root


def _resumed(root: Path, base: Path) -> list[dict]:
    """Three steps; from there on at another layout; on at the same; another run from there."""
    zero_ep2 = [*whole.ZERO, *whole.EP2]
    first = ["--exit-interval", "3", "--save-interval", "3"]
    stopped = str(_directory(root, "stopped", "real"))
    return [
        _case(root, "stopped", base, [*zero_ep2, *first], inject=False),
        _case(root, "resharded", base, [*whole.ZERO, *whole.TP2, "--load", stopped], inject=False),
        _case(
            root, "from adapters", base, [*zero_ep2, "--load", stopped, "--finetune"], inject=False
        ),
        _case(root, "stopped", base, zero_ep2, inject=False),
    ]


def _reference(layout: str) -> str:
    return f"one rank {'AdamW' if 'AdamW' in layout else ''}"


def _differences(runs: Path, layout: str, kind: str) -> dict[str, float]:
    found = _directory(runs, layout, kind)
    differences = whole._largest_differences(found, _directory(runs, _reference(layout), kind))
    assert all(".adapter." in key for key in differences), "the base is not saved again"
    assert len(differences) > 40
    return differences


@pytest.mark.parametrize("layout", ALL)
def test_injected_gradients_leave_factors_and_momentum_bit_equal(runs, layout):
    moved = {k: d for k, d in _differences(runs, layout, "injected").items() if d > 0}
    assert not moved, f"{layout}: {len(moved)} differ: {moved}"


def _losses(directory: Path) -> list[float]:
    return [record.loss for record in read_records(directory / METRICS_FILE)]


@pytest.mark.parametrize("layout", ALL)
def test_five_steps_equal_one_rank(runs, layout, record_property):
    names = (layout, _reference(layout))
    found, expected = (_losses(_directory(runs, name, "real")) for name in names)
    relative = [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
    assert max(relative) < 1e-6, f"{layout}: {max(relative):.1e}"
    factors = {
        key: difference
        for key, difference in _differences(runs, layout, "real").items()
        if not key.startswith("momentum_buffer")
    }
    worst = max(factors, key=lambda key: factors[key])
    record_property("difference", factors[worst])
    record_property("bar", 1e-6)
    assert factors[worst] < 1e-6, f"{layout}: {worst} {factors[worst]:.1e}"


def test_adapters_begun_by_rank_are_far_off(runs):
    """What a table shared by EP rank would give, and how far five steps go."""
    factors = whole._largest_differences(
        _directory(runs, WRONG, "real"), _directory(runs, _reference(WRONG), "real")
    )
    assert max(d for key, d in factors.items() if ".experts." in key) > 1e-3


def test_the_optimizer_holds_the_adapters_alone(runs):
    """Elements of its state, counted in the checkpoint: one momentum an element of a factor."""
    tensors = whole._tensors(_directory(runs, "ZeRO DP2", "real"))
    factors = sum(t.numel() for k, t in tensors.items() if not k.startswith("momentum_buffer"))
    momenta = sum(t.numel() for k, t in tensors.items() if k.startswith("momentum_buffer"))
    assert factors == momenta > 0
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_a_stopped_run_resumes_to_the_last_digit(runs):
    found, expected = (_directory(runs, name, "real") for name in ("stopped", "ZeRO EP2"))
    assert _losses(found) == _losses(expected)
    assert not any(whole._largest_differences(found, expected).values())


def test_it_goes_on_at_another_layout_and_begins_another_run(runs):
    one = _directory(runs, "one rank ", "real")
    resharded = _directory(runs, "resharded", "real")
    assert _losses(resharded) == pytest.approx(_losses(one)[3:], rel=1e-6)
    anew = _losses(_directory(runs, "from adapters", "real"))
    assert len(anew) == whole.STEPS
    assert anew[0] != _losses(one)[0], "it begins where the other's adapters stood"
