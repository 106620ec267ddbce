"""vLLM's ``kimi_k2`` tool parser over answers: run by its own Python, ``read_calls.py TOKENIZER``.

Texts as a JSON list on stdin; on stdout a line that begins with ``CALLS``.
"""

import json
import sys

from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParserManager

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "add")
]


def main(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    said = [{"role": "user", "content": "x"}]
    request = ChatCompletionRequest(model="k2", messages=said, tools=TOOLS)
    make = ToolParserManager.get_tool_parser("kimi_k2")
    found = []
    for text in json.load(sys.stdin):
        read = make(tokenizer, request.tools).extract_tool_calls(text, request)
        calls = [[call.id, call.function.name, call.function.arguments] for call in read.tool_calls]
        found.append({"content": read.content or "", "calls": calls})
    print("CALLS " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
