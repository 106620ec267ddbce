"""A fake OpenAI-compatible server that fails: ``python -m tests.engine.remote.faulty_server JSON``.

Prints its port. ``{"errors", "busy", "cut", "slow"}`` are shares of the attempts, drawn by hash of
the request and of how often it has come. An answer's text names the request. It speaks just the
HTTP that it needs, so that it is no bound of what is measured. ``GET /counts``: what it has done.
"""

import asyncio
import collections
import hashlib
import json
import sys

SHARES = {"errors": 0.08, "busy": 0.04, "cut": 0.03, "slow": 0.01}
SLOW_SECONDS, RETRY_AFTER = 1.0, 0.05


def drawn(*parts):
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64


def answer_of(body):
    """What an answer must say."""
    return f"answer to {body['id']}"


class Faulty(asyncio.Protocol):
    def __init__(self, server):
        self.server, self.buffer = server, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        if head.startswith(b"GET"):
            self.send(200, self.server.counts)
            return
        self.respond(json.loads(rest[:length]), head)

    def respond(self, body, head):
        counts, name = self.server.counts, body["id"]
        counts["attempts"] += 1
        self.server.attempts[name] += 1
        fault = self.server.fault(name)
        if fault:
            counts[fault] += 1
        if fault == "errors":
            self.send(500, {"error": {"message": "it broke"}})
        elif fault == "busy":
            self.send(429, {"error": {"message": "too many"}}, f"Retry-After: {RETRY_AFTER}\r\n")
        elif fault == "cut":
            self.send(200, self.whole(body, head), cut=20)
            self.transport.close()
        elif fault == "slow":
            loop = asyncio.get_running_loop()
            loop.call_later(SLOW_SECONDS, self.send, 200, self.whole(body, head))
        else:
            self.send(200, self.whole(body, head))

    def whole(self, body, head):
        self.server.counts["answered"] += 1
        key = next((h for h in head.split(b"\r\n") if h.lower().startswith(b"authorization")), b"")
        self.server.keys.add(key)
        return {"choices": [{"text": answer_of(body), "finish_reason": "stop"}]}

    def send(self, status, value, more="", cut=0):
        if self.transport.is_closing():
            return
        content = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        whole = head.encode() + content
        self.transport.write(whole[: len(whole) - cut])


class Server:
    def __init__(self, shares):
        self.shares = shares
        self.counts, self.attempts = collections.Counter(), collections.Counter()
        self.keys = set()

    def fault(self, name):
        place = drawn(name, self.attempts[name])
        for fault, share in self.shares.items():
            if place < share:
                return fault
            place -= share
        return None

    async def listen(self):
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Faulty(self), "127.0.0.1", 0, backlog=4096)


async def main(shares):
    listening = await Server(shares).listen()
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]) if sys.argv[1:] else SHARES))
