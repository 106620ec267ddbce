"""Forms and files of dialogues: the same tokens from each, and what is refused or rejected."""

import gzip
import json
import sys

import pytest

from megatron_k2.errors import UserError
from tests.support.chat_sets import documents, line, load_tokenizer_of

CALL = {"id": "call_9", "type": "function", "function": {"name": "tide", "arguments": "{}"}}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "call_9"},
        {"role": "assistant", "content": "a"},
    ],
    "tools": [{"type": "function", "function": {"name": "tide"}}],
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "tide", "arguments": {}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "a"},
    ],
    "tools": '[{"name": "tide"}]',
}


def test_both_forms_and_every_file_give_the_same_tokens(small, tmp_path):
    expected = documents(small([json.dumps(WITH_TOOLS)])[0])
    text = load_tokenizer_of(small([json.dumps(WITH_TOOLS)])[0]).decode(expected[0][0])
    assert "functions.tide:0" in text
    assert "call_9" not in text
    assert documents(small([json.dumps(SHAREGPT)])[0]) == expected
    assert documents(small([json.dumps([WITH_TOOLS, SHAREGPT])], "in.json")[0]) == expected
    packed = gzip.compress(json.dumps(WITH_TOOLS).encode())
    assert documents(small(packed, "in.jsonl.gz")[0]) == expected
    kept, _ = small([json.dumps(WITH_TOOLS)], call_ids="keep")
    assert "call_9" in load_tokenizer_of(kept).decode(documents(kept)[0][0])


def test_parquet_gives_the_same_tokens(small, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    expected = documents(small([json.dumps(WITH_TOOLS)])[0])
    row = WITH_TOOLS | {"tools": json.dumps(WITH_TOOLS["tools"])}
    write_table(pyarrow.Table.from_pylist([row]), tmp_path / "table.parquet")
    packed, _ = small((tmp_path / "table.parquet").read_bytes(), "in.parquet")
    assert documents(packed) == expected
    with pytest.raises(UserError, match="not a whole Parquet file"):
        small((tmp_path / "table.parquet").read_bytes()[:-9], "in.parquet")


def test_parquet_without_its_reader_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "megatron-k2\[parquet\]"'):
        small(b"PAR1", "in.parquet")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "x", "output": "y"}, "the form is Alpaca's instruction and output"),
        ({"chosen": [], "rejected": []}, "the form is pairs of preference"),
        ({"question": "x", "answer": "y"}, "the keys are question, answer"),
    ],
)
def test_another_form_is_refused_by_name_before_any_work(small, tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        small([json.dumps(row)])
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"from": "alien", "value": "x"}, "turn 1: from 'alien'; expected one of system, human"),
        ({"from": "observation", "value": "x"}, "answers no function_call"),
        ({"from": "function_call", "value": "{"}, "a function_call that is not JSON"),
        ({"from": "function_call", "value": "[1]"}, "a function_call without a name"),
        ({"from": "gpt", "value": 7}, "content is int"),
    ],
)
def test_a_damaged_sharegpt_row_is_rejected_with_its_turn(small, turn, said):
    _, left_out = small([line("a", "b"), json.dumps({"conversations": [turn]})])
    assert said in left_out[0]["reason"]
