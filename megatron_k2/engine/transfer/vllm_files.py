"""vLLM's side of weights that come as files: a transport that its factory is told of.

This file runs in vLLM's interpreter and not in this package's: it imports nothing of ours, and is
written for Python 3.11. vLLM finds ``register`` by an entry point of the group
``vllm.general_plugins``. It reads the directory that it was started with, and from nowhere else.

What came is held against the sender's manifest before the round may be finished: a tensor that was
dropped, cut, sent twice or put in another's place ends it. What the model makes of them (packed,
quantised) it does not say.

Of vLLM 0.32.0. On a CPU its reload is exact for dense models, and silently wrong with experts.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "files"
DIRECTORY = "MEGATRON_K2_WEIGHTS_DIR"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def register() -> None:
    """Tell vLLM of the transport; it may be called in several of its processes, and again."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FilesEngine)


@dataclass
class FilesInit(WeightTransferInitInfo):
    """``{"backend": "files"}``."""

    backend: str = BACKEND


@dataclass
class FilesUpdate(WeightTransferUpdateInfo):
    """One bucket or, at the end, what the round consisted of."""

    file: str = ""
    manifest: str = ""


def digest_of(name: str, tensor: torch.Tensor) -> list[str]:
    """As ``engine/transfer/manifest.py`` takes it on the other side: dtype and digest."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    hashed = hashlib.sha256(f"{name}\0{dtype}\0{list(tensor.shape)}\0".encode())
    hashed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return [dtype, hashed.hexdigest()[:32]]


class FilesEngine(WeightTransferEngine):
    """Buckets of safetensors, in the checkpoint's own names and dtypes."""

    init_info_cls = FilesInit
    update_info_cls = FilesUpdate

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        """Nothing to open; the directory was named at the start."""
        self._directory()
        self._came: dict[str, list[str]] = {}
        self._is_whole = False

    def start_weight_update(self) -> None:
        """Layers take their weights as they lie in a checkpoint from here on."""
        self._came, self._is_whole = {}, False
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdate) -> None:
        """One file."""
        if update_info.file:
            self.model.load_weights(self._noted(self._path(update_info.file)))
            return
        sent = json.loads(self._path(update_info.manifest).read_bytes())["tensors"]
        wrong = [k for k in sent.keys() | self._came.keys() if sent.get(k) != self._came.get(k)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(sent)} weights are not what was sent, {min(wrong)!r} "
                "among them"
            )
        self._is_whole = True

    def _noted(self, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(str(path), "pt") as file:
            for name in file.keys():
                if name in self._came:
                    raise ValueError(f"weight {name!r} came twice")
                tensor = file.get_tensor(name)
                self._came[name] = digest_of(name, tensor)
                yield name, tensor.to(self.device)

    def finish_weight_update(self) -> None:
        """All have come."""
        if not self._is_whole:
            raise ValueError("the round is finished without its manifest")
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing was opened."""

    def _path(self, name: str) -> Path:
        path = self._directory() / name
        if not _NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise ValueError(f"{name[:80]!r} is no file of the weights' directory")
        return path

    def _directory(self) -> Path:
        return Path(os.environ[DIRECTORY])
