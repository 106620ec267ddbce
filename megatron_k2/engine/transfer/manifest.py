"""What a round of weights consisted of, by its sender; and whether an engine holds just that.

A digest covers a tensor's name, dtype, shape and bits, and is taken by whoever has the tensor
first: one that was dropped, cut, or put into another's place on the way has no digest that agrees.
An engine that holds a weight wider than it was sent (a router in fp32) narrows it again, which
gives back every bit.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_k2.engine.protocol import UpdateCode, UpdateError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""That weights may be sent in."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The reverse."""


class Sent(NamedTuple):
    """One tensor of a round."""

    dtype: str
    digest: str


def digest_of(name: str, tensor: Tensor) -> Sent:
    """A tensor's dtype, and 128 bits of SHA-256 over name, dtype, shape and bits.

    Raises:
        UpdateError: it has no dtype that weights are sent in.
    """
    if tensor.dtype not in NAMES:
        raise UpdateError(
            UpdateCode.SOURCE, f"weight '{name}' is {tensor.dtype}: expected {', '.join(DTYPES)}"
        )
    dtype = NAMES[tensor.dtype]
    hashed = hashlib.sha256(f"{name}\0{dtype}\0{list(tensor.shape)}\0".encode())
    hashed.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return Sent(dtype, hashed.hexdigest()[:32])


@dataclass(frozen=True)
class Manifest:
    """All that one round sent."""

    version: str
    tensors: Mapping[str, Sent]

    def require_held(self, held: Mapping[str, Tensor], version: str) -> None:
        """Compare an engine's weights with what was sent.

        Args:
            held: every weight of the engine, by Hugging Face's name.
            version: what the engine was told that it gets.

        Raises:
            UpdateError: the round was another version's, a weight was not sent, or differs.
        """
        if version != self.version:
            raise UpdateError(
                UpdateCode.VERSION,
                f"weights {version!r} were announced, what came is tagged {self.version!r}",
            )
        if unsent := [name for name in held if name not in self.tensors]:
            raise UpdateError(
                UpdateCode.WEIGHTS,
                f"{len(unsent):,} weights of this engine were not sent, '{unsent[0]}' among them",
            )
        differing = [name for name, place in held.items() if not self._is(name, place)]
        if differing:
            raise UpdateError(
                UpdateCode.CHECKSUM,
                f"{len(differing):,} of {len(held):,} weights are not what was sent, "
                f"'{differing[0]}' among them",
            )

    def _is(self, name: str, place: Tensor) -> bool:
        sent = self.tensors[name]
        dtype = DTYPES[sent.dtype]
        if not torch.can_cast(dtype, place.dtype) or place.dtype.itemsize < dtype.itemsize:
            raise UpdateError(
                UpdateCode.CHECKSUM,
                f"weight '{name}' is sent in {sent.dtype} and held in {place.dtype}, which cannot "
                "be compared; send what the engine holds",
            )
        return digest_of(name, place.to(dtype)) == sent

    def to_json(self) -> str:
        """For whoever reads it by ``from_json``."""
        return json.dumps({"weight_version": self.version, "tensors": self.tensors})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Read one.

        Raises:
            UpdateError: it is none.
        """
        try:
            value: dict[str, Any] = json.loads(text)
            tensors = {str(name): Sent(*map(str, sent)) for name, sent in value["tensors"].items()}
            if unknown := {sent.dtype for sent in tensors.values()} - set(DTYPES):
                raise ValueError(f"dtypes {sorted(unknown)}")
            return cls(str(value["weight_version"]), tensors)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UpdateError(
                UpdateCode.DELIVERY, f"what was sent is no manifest of a round: {error!r}"
            ) from None


class Counted:
    """Passes a round's tensors on, and knows afterwards what they were.

    Args:
        tensors: Hugging Face's names and tensors.
        version: of the round.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        self._tensors, self._version = tensors, version
        self._sent: dict[str, Sent] = {}
        self.num_bytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            self._sent[name] = digest_of(name, tensor)
            self.num_bytes += tensor.numel() * tensor.itemsize
            yield name, tensor

    def manifest(self) -> Manifest:
        """Of all that has passed."""
        return Manifest(self._version, dict(self._sent))
