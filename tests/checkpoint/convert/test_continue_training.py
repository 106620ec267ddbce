"""A release imported, trained on at TP2 x EP2 and at one rank, and exported: one model."""

import dataclasses

import pytest

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf.config import without_yarn
from megatron_k2.checkpoint.verify.compare import compare, open_weights
from megatron_k2.checkpoint.verify.inspect import inspect_checkpoint
from megatron_k2.presets import K2_TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory
from tests.support.distributed import start_ranks, wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PRESET = dataclasses.replace(
    without_yarn(K2_TINY),
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    vocab_size=127,
)
STEPS = 2
# Sums over ranks round in another order. AdamW's first steps are g / (|g| + eps): with an eps of
# 1e-8 a gradient that is only rounding noise counts in full, and the head differs by 4e-3 (at a
# learning rate of 1e-2); an eps above the noise leaves 5e-5 on matrices. Newton-Schulz can account
# for that, though it was not traced: it raises the smallest singular values, and rounding with
# them, up to 3.4445^5 = 485 times, whatever the learning rate. At 1e-3, five times K2's, the
# weights then agree to a tenth of it.
FLAGS = f"""
    --preset k2-tiny --mock-data --hidden-size 64 --ffn-hidden-size 96 --num-layers 3
    --moe-layer-freq ([0]*1+[1]*2) --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --vocab-size 127 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 2
    --train-samples {2 * STEPS} --optimizer muonclip --lr 1e-3 --min-lr 1e-4 --adam-eps 1e-2
    --lr-warmup-samples 0 --lr-decay-samples {2 * STEPS}
    --lr-wsd-decay-samples 2 --eval-iters 0 --save-interval {STEPS}
""".split()
SPREAD = """--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2
    --expert-tensor-parallel-size 1""".split()


def test_a_release_trained_on_at_tp2_ep2_exports_what_one_rank_exports(tmp_path):
    release = write_directory(tmp_path / "hf", PRESET, as_fp8(random_weights(PRESET)))
    imported = tmp_path / "imported"
    import_hf(release, imported, ImportOptions(preset="k2-tiny", dtype="fp32"))
    for name, world_size, layout in (("spread", 2, SPREAD), ("one", 1, [])):
        arguments = [*FLAGS, *layout, "--pretrained-checkpoint", str(imported)]
        arguments += ["--save", str(tmp_path / name)]
        logs = tmp_path / f"{name}-logs"
        ranks = start_ranks("megatron_k2.training.pretrain", world_size, arguments, logs)
        wait_for(ranks, logs)
        # config fields, tokenizer and scales are found by the run's own trail to the import
        result = export(tmp_path / name, tmp_path / f"{name}-hf", ExportOptions(dtype="fp32"))
        assert result.source_release == imported / "hf_source"
    assert "TP2" in inspect_checkpoint(tmp_path / "spread").facts["saved at"]

    one, spread = (open_weights(tmp_path / f"{name}-hf") for name in ("one", "spread"))
    moved = {d.name: d.relative for d in compare(one, open_weights(release)).differences}
    found = compare(spread, one)
    assert found.only_in_a == found.only_in_b == ()
    assert all(moved.values())
    assert max(moved.values()) > 1e-3
    assert found.differences[0].relative < 1e-5, found.differences[:5]
