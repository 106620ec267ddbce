"""What each phase reads: the blend as data, as flags, and as the tokens Megatron really draws."""

import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from megatron_k2.data.indexed import (
    bin_path,
    idx_path,
    read_sequence_lengths,
    read_tokens,
    write_indexed,
)
from megatron_k2.data.manifest import (
    DataManifest,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
    write_manifest,
)
from megatron_k2.data.synthetic import DOMAINS, NUM_TOKENS, domain_ids, write_domain
from megatron_k2.errors import UserError
from megatron_k2.flags.data import (
    check_files,
    data_prefixes,
    make_synthetic,
    prefixes_of,
)
from megatron_k2.flags.megatron import add_k2_arguments, last_value
from megatron_k2.launch.blend import DataBlend
from megatron_k2.launch.overrides import apply
from megatron_k2.presets import K2_TINY
from megatron_k2.recipes import CHAINS, get_recipe
from megatron_k2.recipes.blends import BLENDS
from megatron_k2.run.flags import read_flags
from megatron_k2.training.preflight import drop_damaged_index_cache
from tests.support.single_rank import one_rank

VOCABULARY, EOD = K2_TINY.vocab_size, K2_TINY.eos_token_id


@contextmanager
def _megatrons_args(flags):
    """Megatron's global arguments of one rank, from ``flags``."""
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args, validate_args

    before = sys.argv
    sys.argv = ["train", *flags]
    try:
        args = parse_args(add_k2_arguments)
        validate_args(args)
        global_vars.set_args(args)
        yield args
    finally:
        sys.argv = before
        global_vars._GLOBAL_ARGS = None


def _samples_drawn(recipe, save):
    """Samples of each domain in a run, from the tokens that training would be given.

    At least 100: the last twins are of a few long sequences, too few to tell blends apart.
    """
    from megatron_k2.training.providers import datasets_provider

    flags = recipe.to_megatron_args(str(save))
    make_synthetic(read_flags(flags), VOCABULARY, EOD)
    with one_rank(), _megatrons_args(flags) as args:
        num_samples = max(100, args.train_samples)
        train, _, _ = datasets_provider([num_samples, 0, 0])
        tokens = np.stack([train[i]["tokens"].numpy() for i in range(num_samples)])
    counts = {}
    for domain in DOMAINS:
        ids = domain_ids(domain, VOCABULARY)
        is_inside = (tokens >= ids.start) & (tokens < ids.stop)
        pure = (is_inside | (tokens == EOD)).all(axis=1)
        counts[domain] = int(pure.sum())
    assert sum(counts.values()) == len(tokens)  # every sample is of one domain
    return {domain: count for domain, count in counts.items() if count}


def _is_blend(counts, blend):
    """Whether ``counts`` are the parts of ``blend``, to the one sample of Megatron's order."""
    total = sum(counts.values())
    expected = {prefix: part * total for prefix, part in blend.parts}
    return set(counts) == set(expected) and all(
        abs(counts[prefix] - samples) <= 1 for prefix, samples in expected.items()
    )


def test_every_phase_of_the_chain_draws_its_own_blend_and_not_the_one_before(tmp_path):
    blends = []
    for name in CHAINS["kimi_k2_phases_cpu"]:
        recipe = apply(get_recipe(name), [f"data.root={tmp_path}/data"])
        counts = _samples_drawn(recipe, tmp_path / name)
        assert _is_blend(counts, recipe.data), (name, counts)
        assert not any(_is_blend(counts, other) for other in blends if other != recipe.data)
        blends.append(recipe.data)
    assert len(set(blends)) == 3  # 32k and 128k read the same
    # Megatron keeps a prefix's sample indices where a start looks for those that a kill cut short.
    index = next((tmp_path / "data" / "web").glob("cache/*/*.npy"))
    index.write_bytes(index.read_bytes()[:-8])
    drop_damaged_index_cache(data_prefixes(read_flags(recipe.to_megatron_args("runs/x"))))
    assert not index.exists()


@pytest.mark.parametrize("phase", BLENDS)
def test_a_twin_has_the_large_recipes_blend(phase):
    large, small = (get_recipe(f"kimi_k2_{phase}_{where}") for where in ("256gpu_h200", "cpu"))
    assert large.data.parts == small.data.parts
    assert sum(part for _, part in large.data.parts) == pytest.approx(1)
    assert small.data.is_synthetic
    assert not large.data.is_synthetic


def test_a_synthetic_domain_is_its_own_ids_and_the_same_bytes_again(tmp_path):
    for directory in ("a", "b"):
        write_domain(tmp_path / directory / "long", VOCABULARY, EOD)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"long.bin", "long.idx"}
    tokens = read_tokens(tmp_path / "a" / "long")
    assert len(tokens) == NUM_TOKENS
    assert set(read_sequence_lengths(tmp_path / "a" / "long")) == {4096}
    ids = domain_ids("long", VOCABULARY)
    assert set(tokens.tolist()) <= {EOD, *ids}
    assert np.array_equal(tokens, read_tokens(tmp_path / "b" / "long"))
    ranges = [domain_ids(domain, VOCABULARY) for domain in DOMAINS]
    assert len({i for r in ranges for i in r}) == sum(map(len, ranges))
    with pytest.raises(UserError, match="'prose' is not a domain"):
        write_domain(tmp_path / "prose", VOCABULARY, EOD)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["data.weights=1,2"], "2 weights for 4 prefixes"),
        (["data.weights=1,1,1,0"], "0 is not a weight"),
        (["data.weights=1,1,1,nan"], "nan is not a weight"),
        (["data.weights=1,1,1,x"], "'x' is not a number"),
        (["data.prefixes=web,code,web,knowledge"], "'web' is named twice"),
        (["data.root_=x"], "did you mean 'data.root'"),
    ],
)
def test_a_blend_that_cannot_be_is_refused(assignments, words):
    with pytest.raises(UserError, match=words):
        apply(get_recipe("kimi_k2_pretrain_256gpu_h800"), assignments)


def test_a_blend_file_takes_the_prefixes_place_and_is_read_before_megatron_reads_it(tmp_path):
    path = tmp_path / "blend.json"
    recipe = apply(get_recipe("kimi_k2_pretrain_256gpu_h800"), [f"data.file={path}"])
    flags = recipe.to_megatron_args("runs/x")  # it may lie on the cluster
    assert last_value(flags, "--per-split-data-args-path") == str(path)
    assert "--train-data-path" not in flags
    path.write_text(json.dumps({"train": "0.7 a 0.3 b"}))
    with pytest.raises(UserError, match="keys train, valid, test"):
        recipe.to_megatron_args("runs/x")
    path.write_text(json.dumps({"train": f"0.7 {tmp_path}/a", "valid": None, "test": None}))
    with pytest.raises(UserError, match=r"a\.idx does not exist"):
        check_files(read_flags(recipe.to_megatron_args("runs/x")))


def test_prefixes_are_told_from_weights_as_megatron_does():
    from megatron.core.datasets.utils import get_blend_from_list

    for blend in (["a"], ["1", "a"], ["a", "b"], ["0.5", "a", "2", "b"], ["a", "b", "c"]):
        assert prefixes_of(blend) == get_blend_from_list(blend)[0]


def _prepared(directory, vocab_size):
    """What ``data prepare`` leaves, as small as can be; its end of document is 7."""
    write_indexed(directory / "train", [np.arange(8)], np.dtype(np.uint16))
    sizes = [path(directory / "train").stat().st_size for path in (bin_path, idx_path)]
    manifest = DataManifest(
        tokenizer=TokenizerRecord("bpe", "tokenizer", "hash", vocab_size, 7),
        splits={"train": SplitRecord("train", 1, 8, *sizes)},
        source=SourceRecord("none", 0, 0, 0, ""),
        plan_sha256="",
    )
    write_manifest(directory, manifest)


def test_a_prepared_directory_stands_for_its_training_split(tmp_path):
    for name, vocab_size in (("mine", VOCABULARY), ("other", VOCABULARY - 1)):
        (tmp_path / name).mkdir()
        _prepared(tmp_path / name, vocab_size)
    flags = DataBlend(str(tmp_path), (1.0,), ("mine",)).flags(K2_TINY)
    assert flags[:3] == ["--train-data-path", "1", str(tmp_path / "mine" / "train")]
    assert last_value(flags, "--null-tokenizer-eod-id") == "7"
    with pytest.raises(UserError, match="vocabulary has 4095 ids, the model's 4096"):
        DataBlend(str(tmp_path), (1.0,), ("other",)).flags(K2_TINY)
