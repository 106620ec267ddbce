"""Adapters merged on their way into an engine: bit-equal to an export of the merged checkpoint.

The export reads base and adapters from the disk and is held to a dense merge by
``tests/sft/lora/test_export.py``; the push gathers both from the ranks. The wrong variant counts
the scale twice.
"""

import pytest
import torch

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.errors import UserError
from megatron_k2.weight_sync.source import WeightSource
from tests.support.distributed import run_ranks
from tests.support.single_rank import SMALL, build, one_rank
from tests.weight_sync.lora_worker import NUM_ROUNDS
from tests.weight_sync.test_fp8 import SCALE, differing_bits
from tests.weight_sync.test_layouts import TP2_EP2
from tests.weight_sync.worker import DTYPES, differing, expected_of

CASES = {
    "tp1": ({}, "fp32"),
    "scale twice": ({}, "fp32"),
    "tp1 in bf16": ({}, "bf16"),
    "tp2ep2": (TP2_EP2, "fp32"),
    "tp2ep2 in bf16": (TP2_EP2, "bf16"),
    "tp2ep2 in fp8": (TP2_EP2, "fp8"),
}


@pytest.fixture(scope="module")
def pushed(checkpoints, tmp_path_factory):
    """Directory of each case; the first's adapters are all the others' first ones."""
    root = tmp_path_factory.mktemp("lora")
    base = next((checkpoints / "replicated").glob("iter_*"))
    cases = {
        name: {
            "layout": layout,
            "base": str(base),
            "load": "" if name == "tp1" else str(root / "tp1" / "0"),
            "out": str(root / name),
            "dtype": dtype,
            "scale_twice": name == "scale twice",
        }
        for name, (layout, dtype) in CASES.items()
    }
    for size, is_here in ((1, lambda case: not case["layout"]), (2, lambda case: case["layout"])):
        chosen = [case for case in cases.values() if is_here(case)]
        run_ranks("tests.weight_sync.lora_worker", size, chosen, root / f"logs{size}")
    return root


def not_as_exported(directory, number, dtype, out):
    """Names of an engine's weights that are not those of the merged export."""
    export(directory / str(number), out, ExportOptions(dtype=dtype))
    held = torch.load(directory / f"held_{number}.pt")
    if dtype == "fp8":
        return differing_bits(held, expected_of(out, 0))
    return differing(held, expected_of(out, 0), DTYPES[dtype])


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name in CASES if name != "scale twice"])
def test_what_an_engine_holds_is_the_merged_export(pushed, tmp_path, name):
    for number in range(NUM_ROUNDS):
        out = tmp_path / str(number)
        assert not not_as_exported(pushed / name, number, CASES[name][1], out)
    first, last = (torch.load(pushed / name / f"held_{i}.pt") for i in (0, NUM_ROUNDS - 1))
    moved = [name for name in differing_bits(first, last) if not name.endswith(SCALE)]
    assert len(moved) == 3 * 5 + 3 * 1 + 2 * 3 * (1 + 4), "every linear of a layer, nothing else"


@pytest.mark.dist
def test_a_scale_counted_twice_is_seen(pushed, tmp_path):
    wrong = not_as_exported(pushed / "scale twice", 0, "fp32", tmp_path / "out")
    assert len(wrong) == 3 * 5 + 3 * 1 + 2 * 3 * (1 + 4)


def test_a_base_in_block_fp8_is_refused_with_the_way_out():
    lora = "--lora-rank 4 --moe-router-load-balancing-type none".split()
    with one_rank():
        model = build(SMALL, *lora)
        WeightSource([model], SMALL)
        model.hold_base_in_fp8()
        with pytest.raises(UserError, match=r"held in block FP8.*--merge-lora"):
            WeightSource([model], SMALL)
