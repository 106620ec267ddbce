"""Expressions in ``modules_to_not_convert``: those of releases are taken, slow ones are refused.

The oracle is the clock: what is taken matches the longest names there are, and near misses, in well
under a millisecond; the wrong variant, without the bound, would not come back.
"""

import multiprocessing
import re
import time

import pytest

from megatron_k2.checkpoint.block_fp8.layout import QUANTIZATION_CONFIG
from megatron_k2.checkpoint.hf.quantization import BlockFp8, require_known
from megatron_k2.errors import UserError

NAMES = [
    "language_model.model.layers.60.mlp.experts.383.down_proj",
    "model." + "a" * 80 + "!",
    "a" * 200,
]
TAKEN = [
    "lm_head",
    "model.layers.0.self_attn.kv_b_proj",
    r"model\.layers\.\d+\.self_attn\..*",
    ".*mlp.(gate|up|gate_up|down)_proj.*",
    "(?:q|kv)_a_proj",
    "vision_tower",
    "[ab]+[ab]+[ab]+x",  # the slowest that is taken
]
REFUSED = [
    "(a+)+$",
    "(a|a)*b",
    "(a|aa)(a|aa)(a|aa)(a|aa)b",
    "a?" * 30 + "a" * 30,
    ".*.*.*.*x",
    "(.*)\\1\\1x",
    "(?=.*)x",
    "x" * 300,
    "a{1,9}a{1,9}a{1,9}a{1,9}b",
]


def _config(entry):
    return QUANTIZATION_CONFIG | {"modules_to_not_convert": [entry]}


@pytest.mark.parametrize("entry", TAKEN)
def test_what_is_taken_is_tried_in_no_time(entry):
    require_known(_config(entry))
    said = BlockFp8(_config(entry))
    for name in NAMES:
        start = time.perf_counter()
        said.quantizes(f"{name}.weight")
        assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("entry", REFUSED)
def test_what_could_take_for_ever_is_refused_by_its_name(entry):
    with pytest.raises(UserError, match=r"modules_to_not_convert has .* could take for ever"):
        require_known(_config(entry))


def test_a_refused_one_would_not_come_back():
    context = multiprocessing.get_context("fork")
    process = context.Process(target=re.match, args=("(a+)+$", "a" * 40 + "!"))
    process.start()
    process.join(1.0)
    assert process.is_alive()
    process.kill()
    process.join()
