import json

import pytest

from megatron_k2.cli.main import main

DIALOGUE = {
    "messages": [
        {"role": "user", "content": "Tide? <|im_end|>"},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "functions.tide:0",
                    "function": {"name": "tide", "arguments": {"at": "Brest"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "functions.tide:0", "content": "4.2 m"},
        {"role": "assistant", "content": "4.2 m."},
    ],
    "tools": [{"type": "function", "function": {"name": "tide"}}],
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_rendered_and_parsed_back(toy_directory, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(DIALOGUE) + "\n\n" + json.dumps(DIALOGUE) + "\n")
    common = ["--tokenizer", str(toy_directory)]
    render = ["chat", "render", "--jsonl", str(tmp_path / "in.jsonl"), *common]
    assert main([*render, "--output", str(tmp_path / "rendered.jsonl")]) == 0
    first, second = lines(tmp_path / "rendered.jsonl")
    assert first == second
    assert len(first["ids"]) == len(first["loss_mask"])
    assert first["text"].startswith('<|im_system|>tool_declare<|im_middle|>[{"function"')
    parse = ["chat", "parse", "--jsonl", str(tmp_path / "rendered.jsonl"), *common]
    assert main([*parse, "--output", str(tmp_path / "parsed.jsonl")]) == 0
    back = lines(tmp_path / "parsed.jsonl")[0]
    assert back["messages"][0]["content"] == "Tide? <|im_end|>"
    assert back["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"at": "Brest"}'
    assert back["tools"] == DIALOGUE["tools"]


def test_answers_come_back_with_calls_and_reasons(tmp_path, capsys):
    bad = "Look.<|tool_call_begin|>tide:0<|tool_call_argument_begin|>{<|tool_call_end|>"
    counted = bad.replace("tide:0", "call_0")
    rows = [{"text": bad}, {"text": counted, "tools": DIALOGUE["tools"]}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["chat", "parse", "--jsonl", str(tmp_path / "answers.jsonl")]) == 0
    row, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert other["tool_calls"][0]["function"]["name"] == "tide"
    assert row["tool_calls"][0]["function"]["name"] == "tide"
    kinds = {finding["kind"] for finding in row["findings"]}
    assert kinds == {"unexpected_token", "no_prefix", "truncated_arguments", "unfinished"}
    assert main(["chat", "parse", "--strict", "--jsonl", str(tmp_path / "answers.jsonl")]) == 0
    assert (
        "unexpected token in content"
        in json.loads(capsys.readouterr().out.splitlines()[0])["error"]
    )


@pytest.mark.parametrize(
    ("verb", "line", "said"),
    [
        ("render", '{"messages": [{"role": "user"}, {"role": "robot"}]}', "in.jsonl:2: message 2"),
        ("render", "{", "in.jsonl:2: not JSON"),
        ("parse", '{"ids": [1, "x"]}', "in.jsonl:2: expected 'ids'"),
        ("parse", '{"ids": [1]}', "in.jsonl:2: 'ids' mean nothing"),
        ("parse", '{"text": "x", "tools": [1]}', "in.jsonl:2: tools is not a list of objects"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_half_written(tmp_path, capsys, verb, line, said):
    good = json.dumps(DIALOGUE | {"text": "x"})
    (tmp_path / "in.jsonl").write_text(f"{good}\n{line}\n")
    output = tmp_path / "out.jsonl"
    argv = ["chat", verb, "--jsonl", str(tmp_path / "in.jsonl"), "--output", str(output)]
    assert main(argv) == 2
    assert said in capsys.readouterr().err
    assert not output.exists()
