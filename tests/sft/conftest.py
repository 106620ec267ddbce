import random

import pytest

from megatron_k2.chat.declarations import json_declarations
from megatron_k2.chat.template import DEFAULT_SYSTEM
from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.sft.packed_set import PackedSet
from megatron_k2.sft.prepare import prepare_chat
from megatron_k2.sft.prepare_plan import ChatOptions
from tests.support.chat_sets import rejects
from tests.support.dialogues import WORDS, tool


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """A byte-level BPE of 600 with K2's control tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    declared = json_declarations([tool(random.Random(0), "look")], is_sorted=True, is_compact=True)
    texts = [" ".join(WORDS) * 3, DEFAULT_SYSTEM, "tool_declare functions", declared, "tide " * 9]
    train_byte_bpe(texts * 3, 600, directory)
    return directory


@pytest.fixture
def small(tmp_path, tokenizer_directory):
    """Prepare lines as one file, with a sequence of 128."""

    def prepare(lines, name="in.jsonl", **fields):
        path = tmp_path / name
        path.write_text("".join(lines)) if isinstance(lines, list) else path.write_bytes(lines)
        options = {"validation_fraction": 0.0} | fields
        prepare_chat(ChatOptions(tmp_path / "set", (path,), tokenizer_directory, 128, **options))
        packed = PackedSet(tmp_path / "set", capacity=128, method=options.get("method", "best-fit"))
        return packed, rejects(tmp_path / "set")

    return prepare
