"""The command line of fine-tuning: what it expands to, and what it refuses in a sentence."""

import runpy
from pathlib import Path

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value
from megatron_k2.run.flags import read_flags
from megatron_k2.run.record import RUN_RECORD, write_record
from megatron_k2.sft.checks import check_sft, notes
from megatron_k2.sft.flags import expand
from megatron_k2.sft.sets import open_packs, open_set, row_multiple
from megatron_k2.sft.train import SFT
from megatron_k2.training import pretrain
from tests.sft.build_set import write_set
from tests.support.paths import REPOSITORY

SMALL = "--preset k2-tiny --vocab-size 128 --seq-length 64 --max-position-embeddings 64".split()


@pytest.fixture(scope="module")
def chat_set(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "chat", num_samples=200))


def expanded(*words):
    return expand([*SMALL, *words], cuda=False)


def test_defaults_come_before_what_is_typed_and_epochs_become_whole_batches(chat_set):
    flags = expanded("--data", chat_set, "--lr", "1e-4", "--global-batch-size", "8")
    packs = len(open_set(Path(chat_set), "train", capacity=64, multiple=1))
    steps = -(-2 * packs // 8)
    assert last_value(flags, "--train-samples") == str(8 * steps)
    assert last_value(flags, "--lr-decay-samples") == str(8 * steps)
    assert last_value(flags, "--lr-warmup-samples") == str(8 * (steps // 10))
    assert last_value(flags, "--lr") == "1e-4"
    assert last_value(flags, "--lr-decay-style") == "cosine"
    assert last_value(flags, "--sft-data") == chat_set
    assert last_value(flags, "--eval-iters") == "0", "the set has no valid split"
    check_sft(read_flags(flags), 1)


def test_a_run_counted_in_iterations_is_so_throughout(chat_set):
    flags = expanded("--data", chat_set, "--train-iters", "50", "--load", "/a", "--save", "/b")
    assert not [word for word in flags if word.endswith("-samples")]
    assert last_value(flags, "--lr-decay-iters") == "50"
    assert last_value(flags, "--lr-warmup-iters") == "5"
    assert "--finetune" in flags, "another run's weights, not its steps"


def test_weights_and_directories_alternate(chat_set):
    flags = expanded("--data", "0.9", chat_set, "0.1", chat_set, "--lr", "1e-4")
    words = read_flags(flags).sft_data
    assert words == ("0.9", chat_set, "0.1", chat_set)
    packs = open_packs(words, "train", 40, 1, capacity=64, multiple=row_multiple(2))
    assert [packs.locate(i)[0] for i in range(40)].count(1) == 4
    assert all(sum(-(-(n - 1) // 4) * 4 for n in packs[i].lengths) <= 64 for i in range(40))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no --data"),
        (["--data", "/nowhere"], "/nowhere has no chat.json"),
        (["--data", "{set}", "{set}"], "'.*' is no weight"),
        (["--data", "{set}", "--vocab-size", "99"], "128 ids, the model's 99"),
        (["--data", "{set}", "--epochs", "none"], "--epochs none: expected a number above 0"),
        (["--data", "{set}", "--micro-batch-size", "2"], "a pack fills its row"),
        (["--data", "{set}", "--sft"], "--sft is Megatron's"),
        (
            "--data {set} --moe-router-load-balancing-type seq_aux_loss "
            "--moe-aux-loss-coeff 1e-3".split(),
            "seq_aux_loss with packed documents is a mean",
        ),
        (
            ["--data", "{set}", "--eval-iters", "5"],
            "--eval-iters 5: no set of --data has a 'valid'",
        ),
        (["--data", "{set}", "--seq-length", "8"], "longer than a sequence|positions"),
        (
            ["--data", "{set}", "--mtp-num-layers", "1", "--sft-loss", "sample"],
            "weighs that loss by tokens",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(chat_set, words, said):
    words = [word.format(set=chat_set) for word in words]
    with pytest.raises(UserError, match=said):
        check_sft(read_flags(expanded(*words)), 1)


def test_rows_that_do_not_divide_over_the_ranks_are_refused(chat_set):
    with pytest.raises(UserError, match="66: expected a positive multiple of 4"):
        expanded("--data", chat_set, "--context-parallel-size", "2", "--seq-length", "66")


@pytest.mark.parametrize(
    ("trained_with", "warns"),
    [(["--optimizer", "adam"], True), (["--optimizer", "muon", "--muonclip"], False), ([], False)],
)
def test_muonclip_on_weights_that_adamw_trained_warns(tmp_path, chat_set, trained_with, warns):
    write_record(tmp_path / RUN_RECORD, {"flags": trained_with})
    flags = read_flags(expanded("--data", chat_set, "--load", str(tmp_path), "--save", "/b"))
    said = notes(flags)
    assert bool(said) == warns
    assert not warns or "trained with AdamW" in said[0]
    assert notes(read_flags([*flags.words[:-1]])) == [], "without MuonClip there is nothing to say"


def test_print_args_prints_one_flag_a_line(chat_set, capsys):
    assert main(["sft", *SMALL, "--data", chat_set, "--print-args"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert [word for line in found for word in line.split()] == expanded("--data", chat_set)
    assert f"--sft-data {chat_set}" in found


def test_the_example_is_the_verbs_program(monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain, "main", seen.append)
    runpy.run_path(str(REPOSITORY / "examples" / "sft_k2.py"), run_name="__main__")
    assert seen == [SFT]
