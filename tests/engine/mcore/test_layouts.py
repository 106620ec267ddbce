"""Loss and text at every layout, against transformers on the exported checkpoint.

The checkpoint is saved on one rank, with 97 ids, which TP2 pads to 98: the extra row is not in the
checkpoint and must not enter the softmax. On GPUs the reference stays transformers on the CPU. Not
exercised: bf16, TP with EP, more than two ranks. The embedded engine reads the same checkpoint; the
uncached model is its oracle.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, pad

from megatron_k2.engine.local.offline import answers as answers_of
from megatron_k2.engine.local.offline import continued
from megatron_k2.engine.local.opened import core_of
from megatron_k2.engine.protocol import Request, SamplingParams
from tests.engine.mcore.worker import DRAWN, GREEDY, NEW_TOKENS, SEQ_LENGTH, answers, windows
from tests.support.checkpoint_writer import fork_result_queue
from tests.support.devices import require
from tests.support.distributed import BACKENDS, run_ranks
from tests.support.single_rank import SMALL, arguments, build, one_rank, randomise

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PRESET = replace(SMALL, vocab_size=97)
LAYOUTS = {
    "TP2": {"tp": 2},
    "PP2": {"pp": 2, "pipeline_layout": "Et|ttL"},
    "CP2": {"cp": 2},
    "EP2": {"ep": 2},
    "DP2": {},
}
RANDOM = np.random.default_rng(5)
TOKENS = RANDOM.integers(0, 97, 10 * SEQ_LENGTH + 14)  # 11 windows: the last short, 12 with padding
PROMPT = RANDOM.integers(0, 97, 9).tolist()


def _save_checkpoint(run) -> None:
    from megatron.core import dist_checkpointing

    fork_result_queue()
    with one_rank():
        model = build(PRESET, "--preset", "k2-tiny")
        randomise(model)
        state = dict(model.sharded_state_dict())
        state["args"] = arguments(PRESET, "--preset", "k2-tiny")
        state["iteration"] = 1
        (run / "iter_0000001").mkdir(parents=True)
        dist_checkpointing.save(state, str(run / "iter_0000001"))
    (run / "latest_checkpointed_iteration.txt").write_text("1")


def _case(root, name: str, layout: dict) -> dict:
    return {
        "layout": layout,
        "load": str(root / "run"),
        "tokens": TOKENS.tolist(),
        "prompt": PROMPT,
        "out": str(root / name),
    }


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    require("cuda" if request.param == "nccl" else "cpu")  # one rank is this process
    return request.param


@pytest.fixture(scope="module")
def root(backend, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"inference_{backend}")
    _save_checkpoint(root / "run")
    return root


@pytest.fixture(scope="module")
def ranks(root, backend):
    """Where every layout's answers are."""
    cases = [_case(root, name, layout) for name, layout in LAYOUTS.items()]
    run_ranks("tests.engine.mcore.worker", 2, cases, root / "logs", backend)
    return root


@pytest.fixture(scope="module")
def one(root) -> dict:
    from megatron_k2.engine.mcore.ranks import process_group

    with process_group() as device:
        return answers(_case(root, "one", {}), device)


@pytest.fixture(scope="module")
def hf(root):
    from transformers import AutoModelForCausalLM

    from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export

    options = ExportOptions(dtype="fp32", model_type="deepseek_v3")
    export(root / "run", root / "hf", options)
    model = AutoModelForCausalLM.from_pretrained(
        root / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def _window_losses(hf, stride: int, num_padding: int = 0) -> list[float]:
    """-ln p of each predicted token, one window at a time.

    ``stride`` SEQ_LENGTH is right, and so is no column of padding (of zero weights) in the softmax.
    """
    losses: list[float] = []
    for start in range(0, len(TOKENS) - 1, stride):
        window = torch.from_numpy(TOKENS[start : start + SEQ_LENGTH + 1])[None]
        if window.shape[1] < 2:
            continue
        with torch.inference_mode():
            logits = pad(hf(window[:, :-1]).logits[0].double(), (0, num_padding))
        losses += cross_entropy(logits, window[0, 1:], reduction="none").tolist()
    return losses


def test_loss_on_one_rank_is_transformers_loss_over_every_token_once(one, hf):
    expected = _window_losses(hf, SEQ_LENGTH)
    assert one["num_tokens"] == len(expected) == len(TOKENS) - 1
    assert one["loss"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_windows_that_do_not_overlap_would_be_seen(one, hf):
    wrong = _window_losses(hf, SEQ_LENGTH + 1)
    assert len(wrong) != one["num_tokens"]
    assert abs(np.mean(wrong) - one["loss"]) > 1e-3


def test_a_column_of_padding_in_the_softmax_would_be_seen(one, hf):
    assert abs(np.mean(_window_losses(hf, SEQ_LENGTH, num_padding=1)) - one["loss"]) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_one_ranks_loss_on_every_rank(ranks, one, name):
    for rank in range(2):
        found = json.loads((ranks / f"{name}.{rank}.json").read_text())
        assert found["num_tokens"] == one["num_tokens"]
        assert found["loss"] == pytest.approx(one["loss"], abs=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_every_layout_gives_one_ranks_tokens_on_every_rank(ranks, one, name, kind):
    for rank in range(2):
        found = json.loads((ranks / f"{name}.{rank}.json").read_text())
        assert found[kind] == one[kind]


@pytest.fixture(scope="module")
def core(root):
    """The embedded engine over the checkpoint, without an export."""
    return core_of(root / "run", num_slots=4, max_length=SEQ_LENGTH + 1)


def test_the_engine_continues_as_the_uncached_model(core, one):
    assert list(continued(core, PROMPT, GREEDY)) == one["greedy"]
    assert list(continued(core, PROMPT, DRAWN)) == one["drawn"]
    assert answers_of(core, [PROMPT] * 6, DRAWN) == [one["drawn"]] * 6
    other_seed = replace(DRAWN, seed=4)
    assert list(continued(core, PROMPT, other_seed)) != one["drawn"], "a draw hangs on the seed"


def test_the_engine_scores_tokens_as_the_uncached_model(core, one):
    rows, params = windows(TOKENS), SamplingParams(max_tokens=0, prompt_logprobs=0)
    for number, row in enumerate(rows.tolist()):
        core.add(Request(str(number), tuple(row), params))
    found = {}
    while core.has_work:
        found |= {int(name): output.prompt_tokens for name, output in core.step()}
    scored = torch.tensor([[token.logprob for token in found[i][1:]] for i in range(len(rows))])
    expected = torch.tensor(one["scores"])
    assert scored.shape == expected.shape == (4, SEQ_LENGTH - 1)
    assert (scored - expected).abs().max() < 1e-5
    assert (scored - expected.roll(1, 1)).abs().max() > 1


def test_greedy_tokens_are_transformers(one, hf):
    prompt = torch.tensor([PROMPT])
    found = hf.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert found[0, len(PROMPT) :].tolist() == one["greedy"]
    assert one["drawn"] != one["greedy"]


def test_the_command_evaluates_dumps_logits_and_writes_json(root, one, hf, capsys):
    from megatron_k2.checkpoint.verify.against_reference import verify_logits
    from megatron_k2.engine.mcore.ranks import main

    data = _dataset(root / "data")
    common = ["evaluate", "--load", str(root / "run"), "--data", str(data)]
    short = ["--seq-length", str(SEQ_LENGTH)]
    assert main([*common, *short, "--json", str(root / "result.json")]) == 0
    result = json.loads((root / "result.json").read_text())
    assert result["loss_nats"] == pytest.approx(one["loss"], abs=1e-6)
    assert f"{result['loss_nats'] - 4.0:+.6f}" in capsys.readouterr().out
    assert main([*common, *short, "--dump-logits", str(root / "logits.pt")]) == 0
    compared = verify_logits(root / "hf", root / "logits.pt")
    assert compared.max_abs_difference < 1e-5 * compared.max_abs_reference
    assert main([*common, "--seq-length", "40", "--max-tokens", "50"]) == 0
    assert "50 tokens" in capsys.readouterr().out


def test_the_commands_text_is_the_engines(root, core, one, capsys, monkeypatch):
    from megatron_k2.engine.mcore import jobs
    from megatron_k2.engine.mcore.ranks import main

    monkeypatch.setattr(jobs, "load_tokenizer", lambda path: Numbers())
    words = [
        "--load",
        str(root / "run"),
        "--tokenizer",
        "none",
        "--prompt",
        Numbers().decode(PROMPT),
    ]
    length = ["--max-new-tokens", str(NEW_TOKENS)]
    assert main(["generate", *words, *length, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == Numbers().decode(PROMPT + one["greedy"]) + "\n"
    drawn = ["--temperature", "1", "--top-p", "0.9", "--seed", "3"]
    assert main(["generate", *words, *length, *drawn]) == 0
    assert capsys.readouterr().out == Numbers().decode(PROMPT + one["drawn"]) + "\n"


class Numbers:
    """A tokenizer whose text is the ids."""

    vocab_size, eod_id = 97, None

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return "".join(f" {i}" for i in ids)


def test_wrong_inputs_are_refused_in_a_sentence(root, capsys):
    from megatron_k2.engine.mcore.ranks import main

    data = str(_dataset(root / "data"))
    other = str(_dataset(root / "other vocabulary", vocab_size=98))
    run = str(root / "run")
    for argv, message in (
        (["--load", str(root / "none"), "--data", data], "no such directory"),
        (["--load", run, "--data", other], "has 98 ids, the model's 97"),
        (["--load", run, "--data", data, "--split", "test"], "has valid"),
        (["--load", run, "--data", data, "--tensor-model-parallel-size", "2"], "world size 1"),
        (["--load", run, "--data", data, "--max-tokens", "0"], "at least 1"),
    ):
        assert main(["evaluate", *argv]) == 2
        assert message in capsys.readouterr().err


def _dataset(directory, vocab_size: int = 97):
    from megatron_k2.data.indexed import bin_path, idx_path, token_dtype, write_indexed
    from megatron_k2.data.manifest import (
        DataManifest,
        SourceRecord,
        SplitRecord,
        TokenizerRecord,
        write_manifest,
    )

    directory.mkdir(exist_ok=True)
    prefix = directory / "valid"
    write_indexed(prefix, [TOKENS.astype("uint16")], token_dtype(vocab_size))
    split = SplitRecord(
        "valid", 1, len(TOKENS), bin_path(prefix).stat().st_size, idx_path(prefix).stat().st_size
    )
    tokenizer = TokenizerRecord("tokenizer.json", "tokenizer", "", vocab_size, 1)
    source = SourceRecord("test", 1, 1, 0, "")
    write_manifest(directory, DataManifest(tokenizer, {"valid": split}, source, ""))
    (directory / "ngram_baseline.json").write_text('{"bigram_nats": 4.0}')
    return directory
