"""``data chat`` against a loop over rows; what is left out; what a kill leaves.

Not exercised: inputs of more than a few parts, and a power cut.
"""

import filecmp
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from megatron_k2.chat.call_ids import number_calls
from megatron_k2.chat.template import Renderer
from megatron_k2.cli.main import main
from megatron_k2.data.prepare import PrepareOptions, prepare
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.errors import UserError
from megatron_k2.records.messages import Message
from megatron_k2.records.read import read_samples
from megatron_k2.sft import prepare as module
from megatron_k2.sft.manifest import read_manifest
from megatron_k2.sft.packed_set import PackedSet
from megatron_k2.sft.prepare import prepare_chat
from megatron_k2.sft.prepare_plan import ChatOptions
from tests.support import dialogues
from tests.support.chat_sets import documents, line, load_tokenizer_of, rejects

LENGTH = 2048


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 3 MB in two files: sound dialogues, two that stand twice, bad lines, one untrained."""
    root = tmp_path_factory.mktemp("dialogues")
    rng = random.Random(5)
    samples = [dialogues.sample(rng) for _ in range(1800)]
    first = [sample.to_line() for sample in samples[:900]]
    first[:2] = [line("Is berth 7 free?", "Yes."), line("Book it.", "Booked.")]
    first[3:3] = [first[0], "{\n", '{"messages": [{"role": "user", "content": "x"}]}\n', "\n"]
    (root / "a.jsonl").write_text("".join(first))
    second = [sample.to_line() for sample in samples[900:]]
    (root / "b.jsonl").write_text("".join([*second, first[1]]))
    return root


def options_for(corpus, tokenizer_directory, output, **fields):
    inputs = fields.pop("inputs", (corpus,))
    return ChatOptions(output, inputs, tokenizer_directory, LENGTH, **fields)


@pytest.fixture(scope="module")
def reference(corpus, tokenizer_directory, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "set"
    prepare_chat(options_for(corpus, tokenizer_directory, output))
    return output


def one_by_one(corpus, tokenizer_directory):
    """Ids and masks of every sample to keep, in input order, by the slow and obvious way."""
    renderer = Renderer(load_tokenizer(tokenizer_directory))
    seen, found = set(), []
    for path in sorted(corpus.glob("*.jsonl")):
        lines = [line for line in path.read_text().splitlines() if line not in ("{", "")]
        (corpus / "sound").write_text("\n".join(lines))
        for sample in read_samples(corpus / "sound"):
            rendered = renderer.render(number_calls(sample.messages), sample.tools)
            is_new = sample.content_hash not in seen
            if is_new and any(rendered.loss_mask) and len(rendered.ids) <= LENGTH + 1:
                found.append((rendered.ids, rendered.loss_mask))
                seen.add(sample.content_hash)
    (corpus / "sound").unlink()
    return found


def test_the_set_holds_what_a_loop_over_the_rows_keeps(corpus, tokenizer_directory, reference):
    splits = [PackedSet(reference, split, capacity=LENGTH) for split in ("train", "valid")]
    packed = [document for split in splits for document in documents(split)]
    expected = one_by_one(corpus, tokenizer_directory)
    assert sorted(packed) == sorted(expected)
    records = splits[0].manifest.splits
    assert 0.02 < records["valid"].num_samples / len(packed) < 0.08
    assert splits[0].fill > 0.99
    record = records["train"]
    assert record.num_trained_tokens == sum(sum(mask) for _, mask in documents(splits[0]))
    assert record.num_tokens == sum(len(ids) for ids, _ in documents(splits[0]))


def test_what_is_left_out_stands_with_line_and_reason(reference):
    found = [tuple(each.values()) for each in rejects(reference)]
    no_json = "not JSON: Expecting property name enclosed in double quotes at column 2"
    assert found[:3] == [
        ("a.jsonl", 4, "duplicate", "the same dialogue as a.jsonl:1"),
        ("a.jsonl", 5, "invalid", no_json),
        ("a.jsonl", 6, "untrained", "no token to train on: no assistant's turn that counts"),
    ]
    assert found[-1] == ("b.jsonl", 901, "duplicate", "the same dialogue as a.jsonl:2")
    source = read_manifest(reference).source
    assert source.num_read == 1804
    kinds = [kind for _, _, kind, _ in found]
    assert source.rejected == {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    num_kept = sum(split.num_samples for split in read_manifest(reference).splits.values())
    assert num_kept + len(found) == source.num_read


def same_files(a: Path, b: Path) -> bool:
    names = [sorted(str(p.relative_to(d)) for p in d.rglob("*") if p.is_file()) for d in (a, b)]
    _, unequal, broken = filecmp.cmpfiles(a, b, names[0], shallow=False)
    return names[0] == names[1] and not unequal and not broken


def test_workers_change_no_byte(corpus, tokenizer_directory, reference, tmp_path):
    prepare_chat(options_for(corpus, tokenizer_directory, tmp_path / "set", num_workers=2))
    assert same_files(tmp_path / "set", reference)


def _has_a_part(output):
    return any(output.glob(".parts/0*.npz"))


def _merges(output):
    return (output / "rejects.jsonl").exists()


@pytest.mark.parametrize("reached", [_has_a_part, pytest.param(_merges, marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_and_repeated_gives_the_same_bytes(
    corpus, tokenizer_directory, reference, tmp_path, reached
):
    output = tmp_path / "set"
    command = [
        sys.executable,
        "-m",
        "megatron_k2",
        "data",
        "chat",
        "--input",
        corpus,
        "--output",
        output,
        "--tokenizer",
        tokenizer_directory,
        "--sequence-length",
        LENGTH,
        "--workers",
        "2",
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    while not reached(output):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(workers, timeout=10)
    with pytest.raises(UserError, match="interrupted"):
        read_manifest(output)
    prepare_chat(options_for(corpus, tokenizer_directory, output))
    assert same_files(output, reference)


def test_the_same_command_again_does_nothing_and_another_starts_over(
    corpus, tokenizer_directory, reference, tmp_path, monkeypatch
):
    output = tmp_path / "set"
    shutil.copytree(reference, output)
    console = Console(record=True, file=open("/dev/null", "w"), width=200)
    with monkeypatch.context() as patch:
        patch.setattr(module, "work_through", None)
        prepare_chat(options_for(corpus, tokenizer_directory, output), console)
    assert "is complete already" in console.export_text()
    other = options_for(corpus, tokenizer_directory, output, method="none", validation_fraction=0.0)
    assert set(prepare_chat(other, console).splits) == {"train"}
    assert "starting over" in console.export_text()
    assert not list(output.glob("valid.*"))
    assert [path.name for path in output.glob("*.npz")] == [f"train.packs-{LENGTH}-1-none.npz"]


def test_another_sequence_length_packs_the_same_tokens(reference):
    longer = PackedSet(reference, capacity=2 * LENGTH, multiple=4)
    assert len(longer) < len(PackedSet(reference, capacity=LENGTH))
    sizes = [-(-(longer[i].lengths - 1) // 4) * 4 for i in range(len(longer))]
    assert max(size.sum() for size in sizes) <= 2 * LENGTH
    assert sorted(documents(longer)) == sorted(documents(PackedSet(reference, capacity=LENGTH)))
    assert longer.content_hash != PackedSet(reference, capacity=LENGTH).content_hash
    with pytest.raises(UserError, match="samples are longer than 64 positions"):
        PackedSet(reference, capacity=64)


LONG = line("x", "tide " * 120)


def test_samples_that_are_too_long_are_dropped_cut_or_refused(small, tmp_path):
    packed, left_out = small([line("a", "b"), LONG])
    assert len(documents(packed)) == 1
    assert [(each["line"], each["kind"]) for each in left_out] == [(2, "too_long")]
    packed, left_out = small([line("a", "b"), LONG], too_long="truncate")
    assert sorted(len(ids) for ids, _ in documents(packed))[-1] == 129
    assert not left_out
    assert packed.manifest.source.num_truncated == 1
    with pytest.raises(UserError, match=r"in\.jsonl:2: .* a sequence holds 129; choose --too-long"):
        small([line("a", "b"), LONG], too_long="refuse")
    packed, left_out = small([line("a", "b"), line("tide " * 120, "x")], too_long="truncate")
    assert [each["kind"] for each in left_out] == ["too_long"]


def test_only_the_last_turn_is_trained_where_asked(small):
    packed, _ = small([line("a", "b", "c", "d")], trained="last")
    ((ids, mask),) = documents(packed)
    renderer = Renderer(load_tokenizer_of(packed))
    context = [Message("user", "a"), Message("assistant", "b", is_trained=False)]
    messages = [*context, Message("user", "c"), Message("assistant", "d")]
    assert mask == renderer.render(messages).loss_mask
    assert ids == renderer.render(messages).ids


def test_weights_come_with_their_documents(small):
    packed, _ = small([line("a", "b", weight=2.5), line("c", "d")], method="none")
    assert [packed[index].weights.tolist() for index in range(2)] == [[2.5], [1.0]]


def test_a_dialogue_of_the_validation_set_is_not_in_training_too(tmp_path, tokenizer_directory):
    (tmp_path / "train.jsonl").write_text(line("a", "b") + line("c", "d"))
    (tmp_path / "valid.jsonl").write_text(line("c", "d") + line("e", "f"))
    prepare_chat(
        ChatOptions(
            tmp_path / "set",
            (tmp_path / "train.jsonl",),
            tokenizer_directory,
            128,
            valid_inputs=(tmp_path / "valid.jsonl",),
        )
    )
    sets = [
        documents(PackedSet(tmp_path / "set", split, capacity=128)) for split in ("train", "valid")
    ]
    assert [len(each) for each in sets] == [2, 1]
    assert not [document for document in sets[0] if document in sets[1]]


def test_nothing_left_is_an_error_that_says_why(small):
    with pytest.raises(UserError, match="training: 0, for validation: 0; left out: untrained 1"):
        small([line("only a question")])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sequence-length 0", "--sequence-length 0"),
        ("--sequence-length 64 --multiple 48", "multiple of the second"),
        ("--sequence-length 64 --pack worst", "--pack worst: expected one of best-fit"),
        ("--sequence-length 64 --too-long cut", "--too-long cut"),
        ("--sequence-length 64 --template 0999", "template generation '0999'"),
        ("--sequence-length 64 --validation-fraction 1", "--validation-fraction 1"),
        ("--sequence-length 64 --workers 0", "--workers 0"),
    ],
)
def test_contradictory_options_are_refused(tmp_path, tokenizer_directory, capsys, words, said):
    (tmp_path / "in.jsonl").write_text(line("a", "b"))
    argv = ["data", "chat", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "set"]
    argv += ["--tokenizer", tokenizer_directory, *words.split()]
    assert main(list(map(str, argv))) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_directory_holds_one_kind_of_set(tmp_path, tokenizer_directory, reference):
    (tmp_path / "in.jsonl").write_text(line("a", "b"))
    (tmp_path / "text.txt").write_text("some text")
    text = PrepareOptions(
        reference, (tmp_path / "text.txt",), tokenizer=tokenizer_directory, validation_fraction=0
    )
    with pytest.raises(UserError, match=r"another kind of dataset \(chat\.json\)"):
        prepare(text)
    prepare(replace(text, output=tmp_path / "text"))
    with pytest.raises(UserError, match=r"another kind of dataset \(dataset\.json\)"):
        prepare_chat(
            ChatOptions(tmp_path / "text", (tmp_path / "in.jsonl",), tokenizer_directory, 128)
        )
    assert (tmp_path / "text" / "tokenizer").is_dir()
    with pytest.raises(UserError, match="lies in --output"):
        ChatOptions(tmp_path / "x", (tmp_path / "in.jsonl",), tmp_path / "x" / "tokenizer", 128)


def test_inspect_prints_a_set(reference, capsys):
    assert main(["data", "inspect", str(reference)]) == 0
    out = capsys.readouterr().out
    assert "best-fit, 2,048 positions" in out
    assert "duplicate 2" in out


def test_a_damaged_set_is_refused(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / "chat.json").read_text())
    with (tmp_path / "set" / "train.mask.npy").open("rb+") as stream:
        stream.truncate(100)
    with pytest.raises(UserError, match=r"train\.mask\.npy has 100 bytes"):
        PackedSet(tmp_path / "set", capacity=LENGTH)
    for spoiled, said in [
        ({"schema_version": 9}, "schema_version 9"),
        ({"splits": 3}, "not a set's manifest"),
        ({"more": 1}, "not a set's manifest"),
    ]:
        (tmp_path / "set" / "chat.json").write_text(json.dumps(manifest | spoiled))
        with pytest.raises(UserError, match=said):
            read_manifest(tmp_path / "set")
    with pytest.raises(UserError, match="no split 'test'; it has train, valid"):
        PackedSet(reference, "test", capacity=LENGTH)
