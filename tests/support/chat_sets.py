"""Small sets of dialogues, and what is in them."""

import json
from pathlib import Path

import numpy as np

from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.sft.packed_set import PackedSet


def line(*texts, **fields):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return json.dumps({"messages": messages} | fields) + "\n"


def rejects(output):
    return [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]


def documents(packed: PackedSet):
    """Ids and masks of every document of every sequence."""
    found = []
    for index in range(len(packed)):
        sequence = packed[index]
        ends = np.cumsum(sequence.lengths)
        for begin, end in zip(ends - sequence.lengths, ends, strict=True):
            span = slice(begin, end)
            found.append((sequence.tokens[span].tolist(), sequence.loss_mask[span].tolist()))
    return found


def load_tokenizer_of(packed):
    return load_tokenizer(Path(packed._tokens.filename).parent / "tokenizer")
