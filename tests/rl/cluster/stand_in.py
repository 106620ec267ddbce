#!/usr/bin/env python3
"""A server with vLLM's flags and without a model: health, and nothing else. Standard library alone.

It is strict: a flag that it does not know, or one that is missing, ends it.
"""

import argparse
import http.server
import os
import signal
import sys
import time


def parsed(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "tokenizer", "load-format", "dtype", "weight-transfer-config"):
        parser.add_argument(f"--{name}", required=name != "model")
    parser.add_argument("directory", nargs="?")
    for name in (
        "tensor-parallel-size",
        "data-parallel-size",
        "data-parallel-size-local",
        "data-parallel-rpc-port",
        "data-parallel-start-rank",
        "port",
    ):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--data-parallel-address")
    parser.add_argument("--host")
    for name in ("headless", "enable-expert-parallel", "fails"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args(argv)


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def main(argv):
    if argv[:2] == ["-m", "vllm.entrypoints.cli.main"]:
        assert argv.pop(2) == "serve"
    else:
        assert argv[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    flags = parsed(argv[2:])
    assert os.environ["VLLM_API_KEY"] not in " ".join(argv)
    assert not {"RANK", "MASTER_ADDR"} & set(os.environ)
    if flags.fails:
        sys.exit("no CUDA device is left")
    print("flags", vars(flags), flush=True)
    if flags.headless:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that hangs in a collective
        time.sleep(3600)
    http.server.HTTPServer((flags.host, flags.port), Health).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
