"""vLLM's side of a round of new weights as files, by its own plug for weight transfer (0.32).

Each worker maps the files and gives their tensors to the model as a checkpoint's. What came is held
against the sender's manifest before the round is finished: a tensor that was dropped, cut, sent
twice or put in another's place ends it. Of what the model makes of them (packed, quantised) vLLM
says nothing: ``engine check`` does.

Read by vLLM's Python, which may be 3.11.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_k2.engine.protocol import UpdateCode, UpdateError
from megatron_k2.engine.transfer.incoming import Incoming
from megatron_k2.engine.transfer.manifest import Manifest, Sent, digest_of
from megatron_k2.engine.transfer.vllm_plugin import DIRECTORY


@dataclass
class Init(WeightTransferInitInfo):  # type: ignore[misc]
    """Body of ``/init_weight_transfer_engine``."""

    backend: str = "files"


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Body of ``/update_weights``: one of the two, a name without a path."""

    file: str = ""
    manifest: str = ""


class FileReceiver(WeightTransferEngine):  # type: ignore[misc]
    """See the module."""

    init_info_cls = Init
    update_info_cls = Update

    def init_transfer_engine(self, init_info: Init) -> None:
        """Find the directory; a body cannot name another."""
        self._incoming = Incoming(Path(os.environ[DIRECTORY]))
        self._came: dict[str, Sent] = {}
        self._is_whole = False

    def start_weight_update(self) -> None:
        """Weights go in layer by layer from here on."""
        self._came, self._is_whole = {}, False
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, str]) -> None:
        """As vLLM's own, which waits for an accelerator that need not be there."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Update) -> None:
        """A bucket, or at the end what the round consisted of.

        Raises:
            UpdateError: what came is not what was sent.
        """
        if update_info.file:
            self.model.load_weights(self._noted(update_info.file))
        else:
            self._require_came(self._incoming.read_manifest(update_info.manifest))
            self._is_whole = True

    def _noted(self, name: str) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in self._incoming.read(name):
            if key in self._came:
                raise UpdateError(UpdateCode.WEIGHTS, f"weight '{key}' came twice")
            self._came[key] = digest_of(key, tensor)
            yield key, tensor.to(self.device)

    def _require_came(self, manifest: Manifest) -> None:
        sent = dict(manifest.tensors)
        wrong = [k for k in sent.keys() | self._came.keys() if sent.get(k) != self._came.get(k)]
        if wrong:
            raise UpdateError(
                UpdateCode.CHECKSUM,
                f"{len(wrong):,} of {len(sent):,} weights are not what was sent, "
                f"'{min(wrong)}' among them",
            )

    def finish_weight_update(self) -> None:
        """Make the model whole.

        Raises:
            UpdateError: nobody said what the round consisted of.
        """
        if not self._is_whole:
            raise UpdateError(UpdateCode.DELIVERY, "the round is finished without its manifest")
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""
