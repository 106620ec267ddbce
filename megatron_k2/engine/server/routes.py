"""Routed experts on the wire, as vLLM sends them: base64 of a ``.npy`` of [tokens, layers, k]."""

import base64
import io
from collections.abc import Sequence

import numpy as np

from megatron_k2.engine.protocol import Token
from megatron_k2.records.routes import Routes


def encoded_routes(tokens: Sequence[Token]) -> str:
    """Of every token that was an input: all but an answer's last."""
    known = (token.routed_experts for token in tokens)
    found = Routes.joined(each for each in known if each is not None).array
    kind = np.uint8 if found.max(initial=0) < 256 else np.int16
    buffer = io.BytesIO()
    np.save(buffer, found.astype(kind), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def decoded_routes(text: str) -> Routes:
    """The reverse.

    Raises:
        ValueError: it is no such array.
    """
    packed = io.BytesIO(base64.b64decode(text, validate=True))
    return Routes.of(np.load(packed, allow_pickle=False))
