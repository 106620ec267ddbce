"""MuonClip over ZeRO with bf16 parameters, and with a multi-token prediction layer.

Gradients and maximum logits are injected (``worker.py``), so every layout must leave fp32 masters,
momentum and weights bit-equal to one rank's, and every bf16 weight must be its master rounded: the
clip acts on the master before the cast. Newton-Schulz runs in fp32 here: in bf16 the rounding of a
batched product depends on how many matrices share the batch, so buckets cut otherwise differ in the
last bit (seen on a CPU: one weight of 224 after five steps). Not exercised: fp16, FP8, MTP under
pipeline parallelism.
"""

import re
from pathlib import Path

import pytest
import torch

from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.parallel.test_layouts import BATCH, EP2, MODEL, OVERLAP, STEPS, TP2, ZERO, batch_of
from tests.parallel.test_reshard import _everything
from tests.support.distributed import BACKENDS, run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BF16 = ["--bf16"]
MTP = "--mtp-num-layers 1".split()
ON_HOST = [*EP2, *OVERLAP, "--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.7"]
LAYOUTS = {"DP2 overlap": OVERLAP, "EP2": EP2, "TP2": TP2, "EP2, 0.7 on the host": ON_HOST}
CASES = [(kind, layout) for kind in ("bf16", "mtp") for layout in LAYOUTS]


def _directory(root: Path, kind: str, layout: str) -> Path:
    return root / re.sub(r"\W", "_", f"{kind} {layout}")


@pytest.fixture(scope="module", params=BACKENDS)
def root(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bf16_mtp")
    alone, together = [], []
    for kind, flags in (("bf16", BF16), ("mtp", MTP)):
        start = _directory(root, kind, "start")
        common = [*MODEL, *ZERO, *flags]
        one = ["--train-samples", str(BATCH), "--save-interval", "1"]
        alone.append({"flags": [*common, *one, "--save", str(start)]})
        load = ["--load", str(start), "--finetune"]
        for layout, extra in {"one rank": [], **LAYOUTS}.items():
            save = ["--save", str(_directory(root, kind, layout))]
            batch = batch_of(2 if extra else 1)  # one for a rank: gradients are injected
            case = {"flags": [*common, *batch, *load, *save, *extra], "inject": True}
            (together if extra else alone).append(case)
    run_ranks("tests.parallel.worker", 1, alone, root / "logs1", request.param)
    run_ranks("tests.parallel.worker", 2, together, root / "logs2", request.param)
    return root


def _final(root: Path, kind: str, layout: str) -> dict[str, torch.Tensor]:
    return _everything(_directory(root, kind, layout) / f"iter_{STEPS:07d}")


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_injected_gradients_leave_everything_bit_equal(root, kind, layout):
    found, expected = _final(root, kind, layout), _final(root, kind, "one rank")
    assert found.keys() == expected.keys()
    differing = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not differing, f"{kind} {layout}: {len(differing)} of {len(expected)}: {differing[:5]}"


@pytest.mark.parametrize("layout", ["one rank", *LAYOUTS])
def test_every_bf16_weight_is_its_master_rounded(root, layout):
    state = _final(root, "bf16", layout)
    masters = {key: tensor for key, tensor in state.items() if "fp32_param." in key}
    assert masters
    for key, master in masters.items():
        weight = state[key.removeprefix("optimizer.state.fp32_param.")]
        assert torch.equal(master.bfloat16().float(), weight), key
    changed = sum((m.bfloat16().float() != m).any().item() for m in masters.values())
    assert changed > len(masters) // 2, "masters that are all bf16 numbers would prove nothing"


def test_the_mtp_layers_heads_are_watched_and_clipped_too(root):
    """Upstream's clip_qk looks at decoder layers only."""
    records = read_records(_directory(root, "mtp", "one rank") / METRICS_FILE)
    assert all(len(record.max_logit_per_layer) == 5 for record in records)
    assert all(record.max_logit_per_layer[-1] > 20 for record in records)
