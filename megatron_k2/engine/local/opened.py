"""The embedded engine's core over a directory: a run, or a Hugging Face one."""

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_k2.checkpoint.stored_model import StoredModel, described_model, open_model
from megatron_k2.data.tokenizer import Tokenizer
from megatron_k2.engine.constrained import Grammars
from megatron_k2.engine.local.core import STEP_TOKENS, Core
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import NO_WEIGHTS
from megatron_k2.errors import UserError


def model_for(
    folder: Path, max_length: int, iteration: int | None = None, *, is_read: bool = True
) -> StoredModel:
    """What lies there, for slots of ``max_length`` tokens; not ``is_read``: its shape alone.

    Raises:
        UserError: see ``open_model``, or the slots are too long for it.
    """
    model = open_model(folder, iteration) if is_read else described_model(folder)
    longest = model.preset.max_position_embeddings
    if max_length > longest:
        raise UserError(f"slots of {max_length} tokens: this model reads up to {longest}")
    return model


def core_of(
    folder: Path,
    *,
    num_slots: int,
    max_length: int,
    iteration: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    version: str = "0",
    step_tokens: int = STEP_TOKENS,
    memory_bytes: int | None = None,
    is_batch_invariant: bool = False,
    tokenizer: Callable[[], Tokenizer] | None = None,
) -> Core:
    """Weights loaded; block FP8 and adapters are made whole as they are read.

    Args:
        folder: a run, or a Hugging Face directory in bf16, fp32 or block FP8.
        num_slots: and what follows is ``Core``'s, but for:
        max_length: of a slot.
        iteration: of a run; None: the latest.
        dtype: to compute in.
        device: to compute on.
        version: of the weights; ``NO_WEIGHTS``: they are not read, and ``config.json`` is enough.
        step_tokens: most rows of a step.
        memory_bytes: that weights and slots may take.
        is_batch_invariant: see ``Core``.
        tokenizer: gives the model's, of which answers are held to grammars; None: to none.

    Raises:
        UserError: see ``model_for``, or it does not fit.
    """
    model = model_for(folder, max_length, iteration, is_read=version != NO_WEIGHTS)
    weights = Weights(model.preset, dtype, torch.device(device), model.expert_groups)
    if version != NO_WEIGHTS:
        weights.load(model.tensors())
    return Core(
        weights,
        num_slots=num_slots,
        max_length=max_length,
        version=version,
        step_tokens=step_tokens,
        memory_bytes=memory_bytes,
        is_batch_invariant=is_batch_invariant,
        grammars=grammars_of(model, tokenizer),
    )


def grammars_of(model: StoredModel, tokenizer: Callable[[], Tokenizer] | None) -> Grammars | None:
    """What answers of a model can be held to."""
    return None if tokenizer is None else Grammars(tokenizer, model.preset.vocab_size)
