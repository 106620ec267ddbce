"""Does an engine compute what its weights say? Log-probabilities, against somebody else's code.

An update that lost a tensor, a kernel that is off, a reload that went wrong: all of them answer
fluently. So a probe is scored twice, as prompt and as greedy answer (the two go through different
code in any engine), and the reference scores the same tokens in one full forward pass.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_k2.engine.protocol import Engine, Request, SamplingParams
from megatron_k2.errors import UserError

NUM_PROBES, PROMPT_TOKENS, NEW_TOKENS = 4, 48, 16


@dataclass(frozen=True)
class Scored:
    """One probe, as the engine scored it."""

    ids: tuple[int, ...]
    """Prompt and answer."""
    num_prompt: int
    logprobs: tuple[float, ...]
    """Of ``ids`` from the second on."""
    weight_versions: frozenset[str]
    """Of the answer's tokens."""


@dataclass(frozen=True)
class Place:
    """One token of a probe, scored by both."""

    probe: int
    position: int
    is_prompt: bool
    token: int
    engine: float
    reference: float

    @property
    def difference(self) -> float:
        """Infinite where either is no number."""
        found = abs(self.engine - self.reference)
        return math.inf if math.isnan(found) else found

    def __str__(self) -> str:
        part = "prompt" if self.is_prompt else "answer"
        return (
            f"probe {self.probe}, token {self.position} ({part}, id {self.token}): engine "
            f"{self.engine:.6f}, reference {self.reference:.6f}"
        )


def drawn_probes(vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of ids drawn from the whole vocabulary: [4][48]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_PROBES, PROMPT_TOKENS)
    return [tuple(row) for row in torch.randint(vocab_size, shape, generator=generator).tolist()]


async def scored_by(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> list[Scored]:
    """Let an engine score prompts, cut to what it holds, and continue them greedily.

    Raises:
        UserError: it holds next to nothing.
        EngineError: it does not answer.
    """
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, prompt_logprobs=0)
    room = engine.limits.max_length - NEW_TOKENS
    if room < 2:
        raise UserError(
            f"the engine's slots are {engine.limits.max_length} tokens long; a check needs "
            f"{NEW_TOKENS + 2}"
        )

    async def one(number: int, prompt: tuple[int, ...]) -> Scored:
        tokens = []
        async for output in engine.generate(Request(f"check-{number}", prompt, params)):
            tokens += [*output.prompt_tokens, *output.tokens]
        scores = [math.nan if t.logprob is None else t.logprob for t in tokens[1:]]
        answer = tokens[len(prompt) :]
        return Scored(
            tuple(t.id for t in tokens),
            len(prompt),
            tuple(scores),
            frozenset(t.weight_version for t in answer),
        )

    return list(await asyncio.gather(*(one(i, prompt[:room]) for i, prompt in enumerate(prompts))))


def reference_logprobs(directory: Path, ids: Sequence[tuple[int, ...]]) -> list[list[float]]:
    """The same tokens by a checkpoint's own code: transformers', or Megatron's for a run.

    Args:
        directory: Hugging Face's, or one that Megatron saved to.
        ids: equally long.

    Raises:
        UserError: the directory cannot be run, or transformers is not installed.
    """
    from megatron_k2.engine.mcore.compare_logits import logits_of

    tokens = torch.tensor(ids)
    try:
        logits = logits_of(directory, tokens)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise UserError(
            f"--reference {directory} is read by transformers, which is not installed; "
            "pip install 'megatron-k2[data]', or name a run of Megatron's"
        ) from None
    scores: Tensor = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return scores.tolist()


def compared(scored: Sequence[Scored], reference: Sequence[Sequence[float]]) -> list[Place]:
    """Every token of every probe but the first, the worst one first."""
    places = [
        Place(probe, at + 1, at + 1 < one.num_prompt, one.ids[at + 1], ours, theirs)
        for probe, (one, row) in enumerate(zip(scored, reference, strict=True))
        for at, (ours, theirs) in enumerate(zip(one.logprobs, row, strict=True))
    ]
    return sorted(places, key=lambda place: -place.difference)


def require_agreement(places: Sequence[Place], tolerance: float) -> None:
    """Refuse an engine that is off.

    Raises:
        UserError: with the largest difference, and where.
    """
    off = [place for place in places if not place.difference <= tolerance]
    if off:
        parts = " and ".join(
            name
            for name, flag in (("prompts", True), ("answers", False))
            if any(place.is_prompt is flag for place in off)
        )
        raise UserError(
            f"the engine does not compute what the reference does: {len(off)} of {len(places)} "
            f"log-probabilities, in {parts}, differ by more than {tolerance:g}, at most by "
            f"{off[0].difference:.3g} at {off[0]}; it holds other weights, or computes them "
            "differently"
        )


def require_version(scored: Sequence[Scored], version: str) -> None:
    """Refuse answers of other weights than these.

    Raises:
        UserError: with the tags that were found.
    """
    found = frozenset[str]().union(*(one.weight_versions for one in scored))
    if found != {version}:
        raise UserError(f"the engine's tokens are tagged {sorted(found)}, expected {version!r}")
