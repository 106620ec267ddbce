"""``megatron-k2 engine check``: the right engine passes, one with one wrong tensor does not.

Not exercised: a run of Megatron's as the reference; its logits are held against transformers' in
``tests/checkpoint/convert/test_logit_parity.py``.
"""

import json
import math

import pytest

pytest.importorskip("transformers", reason="needs the extra data")

from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.cli.main import main
from megatron_k2.engine import check
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.errors import UserError
from tests.engine.local.models import TINY, reference, weights_of
from tests.engine.server.served import served, tokenizer_in

EXPERT = "model.layers.1.mlp.experts.{}.down_proj.weight"


@pytest.fixture(scope="module")
def model():
    return reference(TINY)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("hf")
    named = classic_from_transformers(model.state_dict())
    save_file(
        {k: v.contiguous() for k, v in named.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = hf_config(TINY, model_type="deepseek_v3")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_check(*flags):
    return main(["engine", "check", *map(str, flags)])


def test_an_export_in_the_engine_agrees_with_transformers(exported, capsys):
    flags = ("--engine", exported, "--reference", exported)
    assert run_check(*flags, "--tolerance", "1e-4") == 0
    said = capsys.readouterr().out
    assert "252 log-probabilities agree within 0.0001; the largest difference is" in said
    assert run_check(*flags, "--dtype", "bf16") == 2
    assert "at probe" in capsys.readouterr().err


def test_a_text_may_be_the_probe(exported, tmp_path, capsys):
    (tmp_path / "text").write_text("one two three four five six " * 40)
    tokenizer_in(tmp_path / "tokenizer")
    flags = ["--engine", exported, "--reference", exported, "--text", tmp_path / "text"]
    assert run_check(*flags) == 2
    assert "tokenizer" in capsys.readouterr().err  # the export has none


def dropped(weights, old):
    """One tensor never came, and the old one was kept."""
    weights.held[EXPERT.format(2)].copy_(old.held[EXPERT.format(2)])


def swapped(weights, _old):
    """Two of equal shape in each other's place."""
    a, b = (weights.held[EXPERT.format(i)] for i in (2, 3))
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def all_old(weights, old):
    """An update that answered and transferred nothing."""
    for name, place in weights.held.items():
        place.copy_(old.held[name])


def rotary_off(weights, _old):
    """The shared rotary key's rows in halves instead of pairs: a kernel of another layout."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    rows = weights.held[name][TINY.kv_lora_rank :]
    half = len(rows) // 2
    rows.copy_(rows.reshape(half, 2, -1).transpose(0, 1).reshape(len(rows), -1).clone())


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """Its address, and its engine's weights.

    Started outside of ``capsys``: uvicorn sets logging up, and absl's handler, where Megatron has
    imported it, then closes a standard error that is not the current one.
    """
    weights = weights_of(model, TINY)

    def engine():
        return LocalEngine(Core(weights, num_slots=4, max_length=96, version="new"))

    with served(engine, tokenizer_in(tmp_path_factory.mktemp("tokenizer"))) as (url, _):
        yield url, weights


@pytest.mark.parametrize("fault", [dropped, swapped, all_old, rotary_off])
def test_a_single_wrong_tensor_is_found(model, exported, server, capsys, fault):
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    url, weights = server
    flags = ("--engine", url, "--reference", exported, "--weight-version", "new")
    weights.load(classic_from_transformers(model.state_dict()).items())
    assert run_check(*flags) == 0
    assert run_check(*flags[:-1], "newer") == 2
    fault(weights, weights_of(reference(TINY, seed=1), TINY))
    assert run_check(*flags) == 2
    tagged, found = capsys.readouterr().err.splitlines()
    assert "the engine's tokens are tagged ['new'], expected 'newer'" in tagged
    assert "does not compute what the reference does" in found
    assert "in prompts and answers" in found


def test_a_number_that_is_none_is_off():
    scored = [check.Scored((1, 2, 3), 2, (-1.0, math.nan), frozenset({"1"}))]
    places = check.compared(scored, [[-1.0, -2.0]])
    assert (places[0].difference, places[0].is_prompt) == (math.inf, False)
    with pytest.raises(UserError, match="1 of 2 log-probabilities, in answers, differ"):
        check.require_agreement(places, 1e9)
    check.require_agreement(places[1:], 1e-9)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--reference", "nowhere"], "--reference nowhere: no such directory"),
        (["--tolerance", "0"], "--tolerance 0: expected more than 0"),
        (["--engine", "nowhere"], "expected http://host:port, or a directory"),
        (["--text", "nowhere"], "--text nowhere: no such file"),
    ],
)
def test_what_is_wrong_is_a_sentence(exported, capsys, flags, said):
    assert run_check("--engine", exported, "--reference", exported, *flags) == 2
    assert said in capsys.readouterr().err


def test_a_server_that_is_not_there_is_a_sentence(exported, capsys):
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    assert run_check("--engine", "http://127.0.0.1:9", "--reference", exported) == 2
    assert "http://127.0.0.1:9/v1/models: ClientConnector" in capsys.readouterr().err


def test_without_transformers_a_directory_is_no_reference(exported, monkeypatch):
    from megatron_k2.engine.mcore import compare_logits

    def absent(*_arguments):
        raise ModuleNotFoundError("no", name="transformers.models")

    monkeypatch.setattr(compare_logits, "logits_of", absent)
    with pytest.raises(UserError, match="read by transformers, which is not installed"):
        check.reference_logprobs(exported, [(1, 2)])


def test_probes_are_drawn_again_by_their_seed():
    probes = check.drawn_probes(96, 3)
    assert probes == check.drawn_probes(96, 3) != check.drawn_probes(96, 4)
    assert {len(probe) for probe in probes} == {check.PROMPT_TOKENS}
