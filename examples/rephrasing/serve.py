"""A GGUF file served on the loopback by llama.cpp, by way of xllamacpp (MIT): one slot, one thread.

python serve.py MODEL.gguf SHA256 PORT
"""

import hashlib
import sys
import time

import xllamacpp


def main() -> None:
    path, expected, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise SystemExit(f"{path} has sha256 {found}, expected {expected}; it is not served")
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.port = 8192, 2, port
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.use_jinja = True
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
