"""Uneven pipelines by Megatron's flags: its own count of layers for each stage, or a refusal.

The right values are ``get_num_layers_to_build``'s, asked for every stage of many small layouts;
where it, or the config, asserts, ours must refuse too.
"""

import itertools

import pytest

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import expand
from megatron_k2.parallel.pipeline_split import PipelineSplit
from megatron_k2.run.flags import read_flags
from megatron_k2.training.preflight import check_run


def _megatrons(split, num_layers, pp, vpp):
    """Layers of each [rank][virtual stage], or None where Megatron refuses."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            pipeline_dtype=None if pp == 1 else "fp32",
            num_layers_in_first_pipeline_stage=split.first,
            num_layers_in_last_pipeline_stage=split.last,
            account_for_embedding_in_pipeline_split=split.counts_embedding,
            account_for_loss_in_pipeline_split=split.counts_loss,
        )
        stages = range(vpp) if vpp > 1 else [None]
        held = [[get_num_layers_to_build(config, s, rank) for s in stages] for rank in range(pp)]
    except (AssertionError, ValueError):
        return None
    return held if min(map(min, held)) >= 0 else None  # it lets a stage have -1 layers


def _ours(split, num_layers, pp, vpp):
    try:
        chunks = split.num_chunks(num_layers, pp, vpp)
        stages = split.stages(num_layers, pp)
    except UserError:
        return None
    held = [[n // chunks] * chunks for n in stages]
    held[0][0] -= split.counts_embedding
    held[-1][-1] -= split.counts_loss
    return held


def test_every_split_is_megatrons_or_refused_where_megatron_refuses():
    numbers = (None, 1, 2, 4)
    splits = [PipelineSplit(first, last) for first, last in itertools.product(numbers, numbers)]
    counted = ((True, False), (False, True), (True, True))
    splits += [PipelineSplit(counts_embedding=a, counts_loss=b) for a, b in counted]
    splits += [PipelineSplit(first=1, counts_loss=True)]
    num_ran = 0
    for split, layers, pp, vpp in itertools.product(splits, (3, 4, 5, 6, 7, 8), (2, 3, 4), (1, 2)):
        expected = _megatrons(split, layers, pp, vpp)
        assert _ours(split, layers, pp, vpp) == expected, (split, layers, pp, vpp)
        num_ran += expected is not None
    assert num_ran > 60


def _check(*flags, layers="3", world_size=2):
    typed = ["--preset", "k2-tiny", "--mock-data", "--num-layers", layers, *flags]
    typed += ["--pipeline-model-parallel-size", "2"]
    check_run(read_flags(expand(typed, cuda=False)), world_size)


@pytest.mark.parametrize(
    "flags",
    [
        ["--decoder-first-pipeline-num-layers", "1"],
        ["--decoder-last-pipeline-num-layers", "1"],
        ["--decoder-first-pipeline-num-layers", "2", "--decoder-last-pipeline-num-layers", "1"],
        ["--account-for-loss-in-pipeline-split"],
    ],
)
def test_three_layers_run_on_two_stages(flags):
    _check(*flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--decoder-first-pipeline-num-layers", "1", "--decoder-last-pipeline-num-layers", "1"],
            "2 layers in 2 stages, 3 are due",
        ),
        (["--decoder-first-pipeline-num-layers", "3"], "-first-.* 3: 0 layers do not divide"),
        (
            [f"--account-for-{part}-in-pipeline-split" for part in ("embedding", "loss")],
            "5 layers do not divide by PP = 2; drop",
        ),
        (
            ["--num-layers-per-virtual-pipeline-stage", "1"],
            "3 layers do not divide by PP = 2; give --decoder",
        ),
        (
            [
                *("--decoder-first-pipeline-num-layers", "1"),
                *("--pipeline-model-parallel-layout", "Et|ttL"),
            ],
            "does not go with --pipeline-model-parallel-layout",
        ),
    ],
)
def test_sums_that_do_not_match_are_refused_by_name(flags, said):
    with pytest.raises(UserError, match=said):
        _check(*flags)


def test_layers_per_virtual_stage_give_the_number_of_stages():
    _check("--num-layers-per-virtual-pipeline-stage", "1", layers="4")
    with pytest.raises(UserError, match="has 2 layers; expected a divisor"):
        _check("--num-layers-per-virtual-pipeline-stage", "3", layers="4")
