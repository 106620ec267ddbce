"""Bodies from people who mean it: each is a 4xx with a sentence, never a server's error."""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx2", reason="needs httpx2, which openai brings")

from megatron_k2.engine.scripted import ScriptedEngine  # noqa: E402
from tests.engine.server.served import served, tokenizer_in  # noqa: E402


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    tokenizer = tokenizer_in(tmp_path_factory.mktemp("tokenizer"))
    with served(lambda: ScriptedEngine(400), tokenizer) as (found, _):
        yield found


USER = [{"role": "user", "content": "x"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]
TOKENS = "/inference/v1/generate"
CHAT, PLAIN, SCHEMA = "/v1/chat/completions", "/v1/completions", {"type": "json_schema"}
DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HOSTILE = [
    (PLAIN, b"\xff\xfe{", 400, "not UTF-8"),
    (PLAIN, b"{", 400, "not JSON"),
    (PLAIN, b"[1]", 400, "expected a JSON object"),
    (PLAIN, DEEP, 400, "nested too deeply"),
    (PLAIN, b'{"prompt": "\\ud800"}', 400, "lone surrogate"),
    (PLAIN, {"prompt": "a" * (10 << 20)}, 413, "longer than"),
    (PLAIN, {}, 400, "prompt"),
    (PLAIN, {"prompt": ""}, 400, "empty"),
    (PLAIN, {"prompt": []}, 400, "empty"),
    (PLAIN, {"prompt": [1, "a"]}, 400, "prompt"),
    (PLAIN, {"prompt": [-1], "echo": True, "logprobs": 1}, 400, "token -1"),
    (PLAIN, {"prompt": [1], "max_tokens": -1}, 400, "max_tokens"),
    (PLAIN, {"prompt": [1], "max_tokens": 10**9}, 400, "max_tokens"),
    (PLAIN, {"prompt": [1], "max_tokens": 10**6}, 400, "more than the 4096"),
    (PLAIN, {"prompt": [1], "temperature": -1}, 400, "temperature"),
    (PLAIN, b'{"prompt": [1], "temperature": NaN}', 400, "NaN is not JSON"),
    (PLAIN, {"prompt": [1], "top_p": 0}, 400, "top_p"),
    (PLAIN, {"prompt": [1], "n": 10**6}, 400, "n:"),
    (PLAIN, {"prompt": [1], "stop": [""]}, 400, "stop"),
    (PLAIN, {"prompt": [1], "logit_bias": {"1": 5}}, 400, "logit_bias"),
    (PLAIN, {"prompt": [1], "model": "other"}, 400, "not served here"),
    (PLAIN, {"prompt": [1], "stream": True, "echo": True}, 400, "stream"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "king"),
    (CHAT, {"messages": IMAGE}, 400, "image_url"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"messages": USER, "tools": [{}]}, 400, "without a name"),
    (CHAT, {"messages": USER, "response_format": SCHEMA}, 400, "json_schema"),
    (TOKENS, {"token_ids": [1], "sampling_params": {"logprobs": "x"}}, 400, "logprobs"),
    (TOKENS, {"token_ids": [1], "sampling_params": {"top_p": 2}}, 400, "top_p"),
    ("/tokenize", {}, 400, "one of them"),
    ("/detokenize", {"tokens": [-1]}, 400, "token -1"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "said"), HOSTILE)
def test_what_is_wrong_is_a_sentence(url, path, body, status, said):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{url}{path}", content=content, timeout=30)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]
