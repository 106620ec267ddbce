"""Which experts tokens were sent to, as an engine records it and a trainer replays it.

K2 has 60 MoE layers and eight experts a token: 480 numbers, 960 bytes here and some 16 KB as tuples
of Python's integers, for every token of every answer of an iteration.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EXPERT = np.dtype("<i2")
"""Of an expert's number: K2 has 384."""


@dataclass(frozen=True)
class Routes:
    """Of consecutive tokens, as inputs; compared and hashed by content.

    Raises:
        ValueError: bytes that are no whole tokens.
    """

    experts: bytes = b""
    """[tokens, MoE layers, top-k] int16, little-endian."""
    num_layers: int = 0
    """MoE layers."""
    top_k: int = 0

    def __post_init__(self) -> None:
        size = self._token_size
        if len(self.experts) % size if size else self.experts:
            raise ValueError(
                f"{len(self.experts)} bytes of routes: expected {self.num_layers} layers x "
                f"{self.top_k} experts x {_EXPERT.itemsize} for each token"
            )

    @classmethod
    def of(cls, experts: ArrayLike) -> "Routes":
        """From whole numbers [tokens, MoE layers, top-k].

        Raises:
            ValueError: another shape, no whole numbers, or numbers over 32,767.
        """
        found = np.asarray(experts)
        if found.ndim != 3 or found.dtype.kind not in "iu":
            raise ValueError(
                f"routed experts {found.dtype} {found.shape}: expected whole numbers, 3-D"
            )
        if found.size and not 0 <= found.min() <= found.max() <= np.iinfo(_EXPERT).max:
            raise ValueError(f"routed experts {found.min()} to {found.max()}: expected 0 to 32,767")
        return cls(found.astype(_EXPERT).tobytes(), *found.shape[1:]) if found.size else NO_ROUTES

    @classmethod
    def joined(cls, parts: Iterable["Routes"]) -> "Routes":
        """Of tokens that follow one another.

        Raises:
            ValueError: of two models.
        """
        found = [part for part in parts if part]
        shapes = {(part.num_layers, part.top_k) for part in found}
        if len(shapes) > 1:
            raise ValueError(f"routes of {sorted(shapes)} MoE layers and experts in one answer")
        return cls(b"".join(part.experts for part in found), *shapes.pop()) if found else NO_ROUTES

    @property
    def array(self) -> NDArray[np.int16]:
        """[tokens, MoE layers, top-k], read-only."""
        shape = (len(self), self.num_layers, self.top_k)
        return np.frombuffer(self.experts, _EXPERT).reshape(shape)

    @property
    def _token_size(self) -> int:
        """In bytes."""
        return self.num_layers * self.top_k * _EXPERT.itemsize

    def __len__(self) -> int:
        """Tokens."""
        return len(self.experts) // self._token_size if self._token_size else 0

    def __getitem__(self, place: slice) -> "Routes":
        """Of some of the tokens, without a step."""
        first, last, _ = place.indices(len(self))
        if first >= last:
            return NO_ROUTES
        size = self._token_size
        return Routes(self.experts[first * size : last * size], self.num_layers, self.top_k)

    def __iter__(self) -> Iterator["Routes"]:
        """Of one token after the other."""
        return (self[place : place + 1] for place in range(len(self)))


NO_ROUTES = Routes()
"""Where none were recorded."""
