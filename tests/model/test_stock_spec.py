"""``--spec``: the model that Megatron's own programs build from Megatron's own flags alone."""

import argparse
import sys

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, import_module

from megatron_k2.flags.megatron import add_k2_arguments, model_flags, platform_flags
from megatron_k2.model import spec
from tests.support.devices import DEVICES, here
from tests.support.single_rank import SMALL, build, one_rank, randomise


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


def _stock_arguments(attribute):
    """Parsed by Megatron's parser without our flags; ours are taken out of the preset's first."""
    from megatron.training.arguments import parse_args, validate_args

    ours = add_k2_arguments(argparse.ArgumentParser(allow_abbrev=False))
    _, stock = ours.parse_known_args(
        [*platform_flags(cuda=here().type == "cuda"), *model_flags(SMALL, yarn=False)]
    )
    stock += "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3".split()
    stock += "--seq-length 64 --max-position-embeddings 64 --tokenizer-type NullTokenizer".split()
    stock += f"--vocab-size {SMALL.vocab_size} --calculate-per-token-loss".split()
    stock += ["--spec", "megatron_k2.model.spec", attribute]
    before, sys.argv = sys.argv, [sys.argv[0], *stock]
    try:
        args = parse_args()
        validate_args(args)
    finally:
        sys.argv = before
    args.padded_vocab_size = SMALL.vocab_size
    return args


def _by_model_config(attribute):
    """As ``megatron.training`` 0.19 builds it: the object is called with the model's config."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    config = gpt_config_from_args(_stock_arguments(attribute))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(config).build_model(groups).to(here())


def _as_it_is(attribute, replaced=None):
    """As ``gpt_builders.py`` does: the object is the spec."""
    from megatron.training.arguments import core_transformer_config_from_args

    args = _stock_arguments(attribute)
    model = GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=replaced or import_module(args.spec),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
    )
    return model.to(here())


def _logits(model):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(SMALL.vocab_size, (2, 64), generator=generator)
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(64).expand(2, -1), None)


@pytest.mark.parametrize(
    ("built", "attribute"),
    [(_by_model_config, "block_spec"), (_as_it_is, "numbered_layer")],
)
def test_the_stock_programs_build_the_same_model(built, attribute):
    ours, stock = build(SMALL), built(attribute)
    randomise(ours)
    stock.load_state_dict(ours.state_dict(), strict=True)
    difference = (_logits(stock) - _logits(ours)).abs().max()
    assert difference <= 1e-5 * _logits(ours).abs().max()


def test_one_kind_of_layer_for_all_is_another_model():
    """What an object that knows no pattern would be: experts in the leading dense layer too."""
    ours = build(SMALL)

    class Everywhere(spec.TransformerLayer):
        def __init__(self, config, **named):
            own = spec.layer_spec(config, is_moe=True, latent_norm_epsilon=1e-6)
            super().__init__(config, own.submodules, **named)

    other = _as_it_is("numbered_layer", ModuleSpec(module=Everywhere))
    with pytest.raises(RuntimeError, match=r"decoder\.layers\.0\.mlp\.router"):
        other.load_state_dict(ours.state_dict(), strict=True)
