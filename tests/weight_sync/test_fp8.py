"""Block FP8 on the way to engines: the codes and scales of ``convert export --dtype fp8``.

The export quantises what it reads from the disk; it is held to an oracle of its own by
``tests/checkpoint/block_fp8``. The wrong variant quantises what was rounded to bf16 before.
"""

import pytest
import torch
from safetensors.torch import load_file

from megatron_k2.checkpoint.block_fp8.convert import requantized
from megatron_k2.checkpoint.block_fp8.reference import requantize
from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.stream.rows import rows_of
from megatron_k2.engine.protocol import UpdateError
from megatron_k2.engine.transfer.manifest import digest_of
from tests.campaigns.weight_rounds import LAYOUTS, WORKER
from tests.support.distributed import run_ranks

PRESET = "k2-mini"  # k2-tiny has no matrix of several blocks in both directions
TP2_EP2 = LAYOUTS["TP2xEP2xPP2"][1][:-2]
SCALE = "_scale_inv"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base in fp32, its exports, and what sources at two layouts gave out of it."""
    root = tmp_path_factory.mktemp("fp8")
    case = {"preset": PRESET, "base": str(root / "iter_0000001"), "export": "", "flags": []}
    first = [case | {"out": ""}, case | {"out": str(root / "tp1")}]
    run_ranks(WORKER, 1, first, root / "logs1")
    more = [case | {"flags": TP2_EP2, "out": str(root / "tp2ep2")}]
    run_ranks(WORKER, 2, more, root / "logs2")
    for dtype in ("fp8", "fp32"):
        export(root / "iter_0000001", root / dtype, ExportOptions(PRESET, dtype=dtype))
    return root


def weights(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def differing_bits(found, expected):
    assert found.keys() == expected.keys()
    return [
        name
        for name in found
        if found[name].dtype is not expected[name].dtype
        or not found[name].view(torch.uint8).equal(expected[name].view(torch.uint8))
    ]


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["tp1", "tp2ep2"])
def test_codes_and_scales_are_the_exports(root, layout):
    found, expected = torch.load(root / layout), weights(root / "fp8")
    assert not differing_bits(found, expected)
    assert any(min(s.shape) > 2 for name, s in found.items() if name.endswith(SCALE))


@pytest.mark.dist
def test_weights_rounded_to_bf16_before_would_be_seen(root):
    exact, expected = weights(root / "fp32"), weights(root / "fp8")
    for name in [name.removesuffix(SCALE) for name in expected if name.endswith(SCALE)]:
        codes, scales, _ = requantize(exact[name].bfloat16(), None)
        assert differing_bits(
            {name: codes, name + SCALE: scales},
            {name: expected[name], name + SCALE: expected[name + SCALE]},
        )


def test_bf16_that_travels_in_fp32_is_quantised_as_itself():
    """An export reads a checkpoint's bf16 as it is."""
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scales, _ = requantized(rows_of(weight), None)
    wide_codes, wide_scales, _ = requantized(rows_of(weight.float()), None)
    assert (codes.bits == wide_codes.bits).all()
    assert (scales == wide_scales).all()


@pytest.mark.dist
def test_no_transport_takes_codes_for_weights(root):
    name, codes = next((n, t) for n, t in torch.load(root / "tp1").items() if t.itemsize == 1)
    with pytest.raises(UpdateError, match=f"weight '{name}' is torch.float8_e4m3fn"):
        digest_of(name, codes)
