"""Routed experts on the wire, as vLLM sends them: base64 of a ``.npy`` of [tokens, layers, k]."""

import base64
import io
from collections.abc import Sequence

import numpy as np

from megatron_k2.engine.protocol import Token


def encoded_routes(tokens: Sequence[Token]) -> str:
    """Of every token that was an input: all but an answer's last."""
    rows = [token.routed_experts for token in tokens if token.routed_experts is not None]
    largest = max((expert for row in rows for layer in row for expert in layer), default=0)
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, np.uint8 if largest < 256 else np.int16), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def decoded_routes(text: str) -> list[tuple[tuple[int, ...], ...]]:
    """The reverse: of each token the experts, [MoE layers][k].

    Raises:
        ValueError: it is no such array.
    """
    array = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise ValueError(f"routed experts {array.dtype} {array.shape}: expected whole numbers, 3-D")
    return [tuple(map(tuple, token)) for token in array.tolist()]
