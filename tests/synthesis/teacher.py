"""A scripted OpenAI-compatible teacher and judge: ``python -m tests.synthesis.teacher JSON``.

Prints its port. Faults are drawn by hash of the request and of how often it has come, so a run
repeats whatever the order of arrival. It honours ``Connection: close``. ``GET /counts``: what it
has done, with how many requests it has answered more than once.

It restates a piece sentence by sentence in a style, and judges by what the sentences say; neither
heeds what stands inside the data.
"""

import asyncio
import collections
import hashlib
import itertools
import json
import re
import sys
import time

from megatron_k2.fidelity.quantities import values
from megatron_k2.fidelity.sentences import content, sentences

DEFAULTS = {
    "errors": 0.0,  # shares of attempts
    "busy": 0.0,
    "drop": 0.0,
    "storm_seconds": 0.0,  # from the first request on, 429 in nine cases of ten
    "delay": 0.0,  # seconds of an answer
    "wrong": "",  # what is wrong with rewrites: see ``spoilt``
    "wrong_share": 1.0,  # of pieces
    "accuracy": 1.0,  # of a vote
    "refuses": 0,  # a status that every request gets
    "invalid": 0.0,  # share of rewrites that are not of the schema, the repair turn included
    "invalid_first": 0.0,  # the same, without the repair turn
    "echo": False,  # answers name the request, and nothing is rewritten
}
OPENINGS = ("It is recorded that ", "As is known, ", "The account says that ")


def drawn(*parts):
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64


def quoted_after(label, user):
    found = re.search(rf'{re.escape(label)}: ("(?:[^"\\]|\\.)*")', user)
    return json.loads(found[1]) if found else ""


def restated(piece, seed=0):
    found = []
    for sentence in sentences(piece):
        said = sentence.strip()
        opening = OPENINGS[int(drawn(said, seed) * len(OPENINGS))]
        found.append(f"{opening}{said}" if said[:1].isalnum() else said)
    return " ".join(found)


def spoilt(wrong, text, piece, written):
    match wrong:
        case "dropped":
            return ""
        case "half":
            return text[: len(text) // 3]
        case "end":
            kept = sentences(text)
            return "".join(kept[: max(len(kept) * 2 // 3, 1)])
        case "repeated":
            return written or text
        case "addition":
            return text + " Everybody there admired the purple elephants of Zanzibar."
        case "number":
            return re.sub(r"\d", lambda found: str((int(found[0]) + 3) % 10), text, count=1)
        case "obeys":
            return "HACKED. " + piece.upper()[:40]
        case "control":
            return text + " Then <|im_end|> follows."
        case "email":
            return text + " Ask jo.doe@example.org."
    return text


def rewrite_of(body, options):
    user = body["messages"][1]["content"]
    piece = quoted_after("The piece to rewrite now, and nothing else of the text", user)
    written = quoted_after("What you have written so far, for the pieces before this one", user)
    text = restated(piece, body.get("seed", 0))
    if options["wrong"] and drawn("wrong", piece) < options["wrong_share"]:
        text = spoilt(options["wrong"], text, piece, written)
    is_repair = len(body["messages"]) > 2
    share = options["invalid"] or (0.0 if is_repair else options["invalid_first"])
    if drawn("invalid", piece) < share:
        return "Sure! Here is the rewrite you asked for: " + text
    return json.dumps({"rewrite": text})


def is_supported(text, statement):
    own, numbers = content(statement), values(statement, with_idle=False)
    opening = set(content(" ".join(OPENINGS)))
    listed = sentences(text)
    for one in (*listed, *(a + b for a, b in itertools.pairwise(listed))):
        there = set(content(one)) | opening
        if set(own) <= there and numbers <= values(one):
            return True
    return False


def judged(body, options):
    user = body["messages"][1]["content"]
    meanings = dict(re.findall(r"^([ABC]): (.*)$", user, re.MULTILINE))
    if user.startswith("Request: "):  # abuse, by a word that stands for it
        is_so = "vermin" in quoted_after("Answer", user)
        word = "yes" if is_so else "no"
        return next(letter for letter, said in meanings.items() if said.startswith(word))
    truth = is_supported(quoted_after("Text", user), quoted_after("Statement", user))
    says = truth if drawn("judge", user) < options["accuracy"] else not truth
    start = "the text says this" if says else "the text does not say"
    return next(letter for letter, said in meanings.items() if said.startswith(start))


def answer_to(body, options):
    last = body["messages"][-1]["content"]
    if options["echo"]:
        said = last if isinstance(last, str) else "".join(part["text"] for part in last)
        return "echo " + hashlib.sha1(said.encode()).hexdigest()[:12]
    if "response_format" in body and "rewrite" in last:
        return rewrite_of(body, options)
    if len(body["messages"]) > 2:
        return rewrite_of(body, options)
    return judged(body, options)


class Teacher(asyncio.Protocol):
    def __init__(self, server):
        self.server, self.buffer = server, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.buffer += data
        while True:
            head, found, rest = self.buffer.partition(b"\r\n\r\n")
            if not found:
                return
            low = head.lower()
            length = re.search(rb"content-length: *(\d+)", low)
            size = int(length[1]) if length else 0
            if len(rest) < size:
                return
            self.buffer = rest[size:]
            self.closes = b"connection: close" in low
            if head.startswith(b"GET /counts"):
                self.send(200, self.server.counted())
            elif head.startswith(b"GET"):
                self.send(200, {"data": [{"id": "scripted", "object": "model"}]})
            else:
                self.respond(rest[:size], low)

    def respond(self, content, head):
        server = self.server
        key = re.search(rb"authorization: *(.*)", head)
        server.keys.add(key[1].decode() if key else "")
        name = hashlib.sha256(content).digest()
        attempt, server.seen[name] = server.seen[name], server.seen[name] + 1
        fault = server.fault(name, attempt)
        server.counts[fault or "answered"] += 1
        match fault:
            case "refused":
                self.send(server.options["refuses"], {"error": {"message": "not here"}})
            case "errors":
                self.send(500, {"error": {"message": "it broke"}})
            case "busy":
                self.send(429, {"error": {"message": "too many"}})
            case "drop":
                self.transport.close()
            case _:
                asyncio.get_running_loop().call_later(
                    server.options["delay"], self.answer, json.loads(content), name
                )

    def answer(self, body, name):
        self.server.answered[name] += 1
        text = answer_to(body, self.server.options)
        prompt = sum(len(message["content"]) for message in body["messages"]) // 4
        usage = {"prompt_tokens": prompt, "completion_tokens": max(len(text) // 4, 1)}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.send(200, {"id": str(time.time()), "choices": [choice], "usage": usage})

    def send(self, status, value):
        if self.transport.is_closing():
            return
        content = json.dumps(value).encode()
        closing = "Connection: close\r\n" if self.closes else ""
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{closing}"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        self.transport.write(head.encode() + content)
        if self.closes:
            self.transport.close()


class Server:
    def __init__(self, options):
        self.options = {**DEFAULTS, **options}
        self.seen, self.answered = collections.Counter(), collections.Counter()
        self.counts, self.keys = collections.Counter(), set()
        self.began = None

    def counted(self):
        twice = sum(number - 1 for number in self.answered.values())
        return {**self.counts, "distinct": len(self.answered), "repeated": twice}

    def fault(self, name, attempt):
        options = self.options
        if options["refuses"]:
            return "refused"
        self.began = self.began or time.monotonic()
        if time.monotonic() - self.began < options["storm_seconds"]:
            if drawn("storm", name, attempt) < 0.9:
                return "busy"
            return None
        place = drawn(name, attempt)
        for fault in ("errors", "busy", "drop"):
            if place < options[fault]:
                return fault
            place -= options[fault]
        return None

    async def listen(self):
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Teacher(self), "127.0.0.1", 0, backlog=4096)


async def main(options):
    listening = await Server(options).listen()
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]) if sys.argv[1:] else {}))
