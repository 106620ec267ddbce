"""The rows that padding adds to a vocabulary: no part of a softmax, nor of the random stream.

Megatron pads the vocabulary to a multiple of ``--make-vocab-size-divisible-by`` x TP and lets the
padding's logits into its training softmax: one checkpoint then has another loss at another TP, up
to ln(padded / real) nats. Here the output layer itself hands out -inf there, so that the training
loss (plain or fused), multi-token prediction, evaluation and generation see the ids that exist.

Legend: ``V`` ids that exist; padded, ``P`` of them, a tensor-parallel rank holds ``P / TP``.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Init = Callable[[Tensor], Any]
"""Fills a weight in place."""


def mask_padding(logits: Tensor, vocab_size: int, rank: int) -> Tensor:
    """Logits whose padding columns are -inf: probability and gradient there are exactly 0.

    Args:
        logits: [..., P / TP] of a tensor-parallel rank.
        vocab_size: V.
        rank: within the tensor-parallel group.
    """
    first = rank * logits.shape[-1]
    columns = torch.arange(first, first + logits.shape[-1], device=logits.device)
    return logits.masked_fill(columns >= vocab_size, -torch.inf)


def mask_output_layer(output_layer: torch.nn.Module, vocab_size: int, rank: int) -> None:
    """Have an output layer mask its logits, where this rank holds padding; else leave it alone.

    Args:
        output_layer: Megatron's; called, it returns (logits [s, b, P / TP], bias).
        vocab_size: V.
        rank: within the tensor-parallel group.
    """
    weight: Any = output_layer.weight
    if (rank + 1) * weight.shape[0] <= vocab_size:
        return

    def mask(_layer: Any, _inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        return mask_padding(logits, vocab_size, rank), bias

    output_layer.register_forward_hook(mask)


class UnpaddedDraws:
    """Draws of a vocabulary's two matrices on the CPU as if the vocabulary had no padding.

    Megatron's ``_initialize_affine_weight_cpu`` draws a matrix whole on every rank from one
    generator and keeps the rank's rows, so a matrix does not depend on TP. The padding's rows do:
    they take numbers that the next matrix would have got.

    Args:
        config: of the model; ``embedding_init_method`` is the embedding's alone, the output layer
            has ``init_method`` like every other matrix and is the last that a stage builds.
        vocab_size: V.
        padded_vocab_size: P.
    """

    def __init__(self, config: Any, vocab_size: int, padded_vocab_size: int) -> None:
        self._config, self._num_ids, self._num_rows = config, vocab_size, padded_vocab_size
        self._init: Init = config.init_method
        self._embedding_init: Init = config.embedding_init_method
        self._state: Tensor | None = None

    @contextlib.contextmanager
    def while_building(self) -> Iterator[None]:
        """Put the two methods into the config and take them back."""
        self._config.init_method = self._note_state
        self._config.embedding_init_method = self._fill
        try:
            yield
        finally:
            self._config.init_method = self._init
            self._config.embedding_init_method = self._embedding_init

    def fill_output_layer(self, output_layer: torch.nn.Module, rank: int) -> None:
        """Draw the output layer, just built, again from the state that it was drawn from."""
        assert self._state is not None  # it has a weight of P rows
        torch.set_rng_state(self._state)
        held: Any = output_layer.weight
        whole = torch.empty(self._num_rows, held.shape[1])
        self._draw(self._init, whole)
        first = rank * held.shape[0]
        with torch.no_grad():
            held.copy_(whole[first : first + held.shape[0]])

    def _note_state(self, weight: Tensor) -> Any:
        if weight.shape[0] == self._num_rows:
            self._state = torch.get_rng_state()
        return self._init(weight)

    def _fill(self, weight: Tensor) -> None:
        self._draw(self._embedding_init, weight)

    def _draw(self, init: Init, weight: Tensor) -> None:
        """The rows of ids that exist as ``init`` fills them, zeros below. [P, h]."""
        ids = torch.empty(self._num_ids, *weight.shape[1:])
        init(ids)
        with torch.no_grad():
            weight[: self._num_ids] = ids
            weight[self._num_ids :] = 0
