"""vLLM's side of weights that come as files: a transport that its factory is told of.

This file runs in vLLM's interpreter and not in this package's: it imports nothing of ours, and is
written for Python 3.11. vLLM finds ``register`` by an entry point of the group
``vllm.general_plugins``. It reads the directory that it was started with, and from nowhere else.

Of vLLM 0.32.0. On a CPU its reload is exact for dense models, and silently wrong with experts.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

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
    """One bucket."""

    file: str


class FilesEngine(WeightTransferEngine):
    """Buckets of safetensors, in the checkpoint's own names and dtypes."""

    init_info_cls = FilesInit
    update_info_cls = FilesUpdate

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        """Nothing to open; the directory was named at the start."""
        self._directory()

    def start_weight_update(self) -> None:
        """Layers take their weights as they lie in a checkpoint from here on."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdate) -> None:
        """One file."""
        path = self._directory() / update_info.file
        if not _NAME.fullmatch(update_info.file) or path.is_symlink() or not path.is_file():
            raise ValueError(f"{update_info.file[:80]!r} is no file of the weights' directory")
        with safe_open(str(path), "pt", device=str(self.device)) as file:
            self.model.load_weights([(name, file.get_tensor(name)) for name in file.keys()])

    def finish_weight_update(self) -> None:
        """All have come."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing was opened."""

    def _directory(self) -> Path:
        return Path(os.environ[DIRECTORY])
