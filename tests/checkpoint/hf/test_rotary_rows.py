"""Rotary rows in halves: the order by hand, and logits of transformers, which takes both orders.

fp32, sums in another order: 1e-5 of the largest logit, as ``test_logit_parity``. That rows left as
they lie are seen is there too ("halves").
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf.release import open_release
from megatron_k2.checkpoint.hf.rotary_rows import order_of
from megatron_k2.checkpoint.verify.compare import compare, open_weights
from megatron_k2.engine.mcore.compare_logits import compare_logits
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.convert.test_logit_parity import random_preset
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory

NOTE = "rope_interleave is false: rotary rows brought into pairs, an export says true"


def test_two_heads_by_hand():
    found = order_of("model.layers.0.self_attn.q_b_proj.weight", 14, rotary=4, head=7)
    assert found is not None
    assert found.tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 12, 11, 13]
    found = order_of("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", 9, rotary=6, head=7)
    assert found is not None
    assert found.tolist() == [0, 1, 2, 3, 6, 4, 7, 5, 8]
    for other in ("kv_b_proj", "o_proj", "q_a_proj"):
        assert order_of(f"model.layers.0.self_attn.{other}.weight", 14, 4, 7) is None
    assert order_of("model.layers.0.self_attn.q_proj.weight", 15, 4, 7) is None


@pytest.mark.parametrize("seed", [0, 2])
def test_a_release_in_halves_is_imported_and_exported_in_pairs(tmp_path, seed):
    """With and without a latent of the query."""
    preset = random_preset(seed)
    weights = random_weights(preset, torch.float32, seed)
    release = write_directory(tmp_path / "hf", preset, weights, rope_interleave=False)
    assert import_hf(release, tmp_path / "megatron", ImportOptions()).notes == (NOTE,)
    export(tmp_path / "megatron", tmp_path / "back", ExportOptions(dtype="fp32"))
    for imported in (tmp_path / "megatron", tmp_path / "back"):
        found = compare_logits(imported, release)
        assert found.max_abs_difference < 1e-5 * found.max_abs_reference
        assert compare(open_weights(imported), open_weights(release)).is_equal
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_interleave"] is True


@pytest.mark.parametrize("head", [(128, 64), (100, 64)], ids=["one block", "two blocks"])
def test_block_fp8_keeps_its_scales_or_is_refused(tmp_path, head):
    preset = dataclasses.replace(
        TINY, num_attention_heads=2, qk_head_dim=head[0], qk_pos_emb_head_dim=head[1]
    )
    weights = as_fp8(random_weights(preset))
    release = write_directory(tmp_path / "hf", preset, weights, rope_interleave=False)
    if head[0] == 100:
        with pytest.raises(
            UserError, match=r"q_b_proj.weight' is FP8 with rotary rows in two rows"
        ):
            import_hf(release, tmp_path / "megatron", ImportOptions())
        return
    import_hf(release, tmp_path / "megatron", ImportOptions())
    found = compare_logits(tmp_path / "megatron", release)
    assert found.max_abs_difference < 1e-5 * found.max_abs_reference
    export(tmp_path / "megatron", tmp_path / "back", ExportOptions(dtype="fp8"))
    assert compare(open_weights(tmp_path / "back"), open_weights(release)).is_equal


def test_any_rows_are_those_of_the_whole(tmp_path):
    release = write_directory(tmp_path / "hf", TINY, random_weights(TINY), rope_interleave=False)
    source = open_release(release).source
    for name in source.orders:
        whole = source.read(name).bits
        for begin in range(0, len(whole), 7):
            assert np.array_equal(
                source.read(name, slice(begin, begin + 5)).bits, whole[begin : begin + 5]
            )
    assert len(source.orders) == 2 * TINY.num_layers


def test_sizes_that_are_none_are_said(tmp_path):
    release = write_directory(
        tmp_path / "hf", TINY, random_weights(TINY), rope_interleave=False, qk_rope_head_dim="8"
    )
    with pytest.raises(UserError, match="qk_rope_head_dim='8'"):
        open_weights(release)
