import random

import pytest

from megatron_k2.chat.declarations import json_declarations
from megatron_k2.chat.template import DEFAULT_SYSTEM
from megatron_k2.data.hf_tokenizer import train_byte_bpe
from tests.support.dialogues import WORDS, tool


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """A byte-level BPE of 600 with K2's control tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    declared = json_declarations([tool(random.Random(0), "look")], is_sorted=True, is_compact=True)
    texts = [" ".join(WORDS) * 3, DEFAULT_SYSTEM, "tool_declare functions", declared, "tide " * 9]
    train_byte_bpe(texts * 3, 600, directory)
    return directory
