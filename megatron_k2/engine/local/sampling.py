"""The next token of many rows at once, each by its own parameters and its own random number.

A row's draw is one uniform number against the sum of its filtered probabilities: it depends on the
row's logits and that number alone, not on what else is in the batch. The number is a hash of the
request's seed and the token's place, so an answer that is continued from its own beginning draws as
it would have. Order, as in vLLM: mask, penalty, temperature, top-k, top-p, min-p.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_k2.engine.protocol import Candidate, SamplingParams, Token


@dataclass
class Row:
    """One row's draw."""

    params: SamplingParams
    uniform: float
    """In [0, 1); at temperature 0 of no use."""
    seen: Sequence[int] = ()
    """Prompt and answer so far, for the repetition penalty."""
    allowed: Tensor | None = None
    """[V] bool: other tokens have no chance."""


def masked(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits with -inf where a row's token is not allowed, [B, V]; the same tensor without any."""
    if all(row.allowed is None for row in rows):
        return logits
    out = logits.clone()
    for line, row in zip(out, rows, strict=True):
        if row.allowed is not None:
            line.masked_fill_(~row.allowed.to(line.device), -torch.inf)
    return out


def uniform(seed: int, place: int) -> float:
    """The number that a request of this seed draws for the token at this place, in [0, 1).

    24 bits, so that fp32 holds it.
    """
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=3).digest()
    return int.from_bytes(digest, "big") / (1 << 24)


def penalised(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits after each row's repetition penalty, [B, V]; the same tensor where there is none."""
    if all(row.params.repetition_penalty == 1 for row in rows):
        return logits
    out = logits.clone()
    for line, row in zip(out, rows, strict=True):
        ids = torch.tensor(sorted(set(row.seen)), dtype=torch.long, device=out.device)
        penalty, values = row.params.repetition_penalty, line[ids]
        line[ids] = torch.where(values > 0, values / penalty, values * penalty)
    return out


def filtered(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p; [B, V], not normalised.

    Args:
        logits: [B, V] fp32, after penalties.
        params: of each row; temperature above 0.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    probs = (logits / column([p.temperature for p in params])).softmax(-1)
    if any(p.top_k or p.top_p < 1 for p in params):
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        place = torch.arange(probs.shape[-1], device=probs.device)
        kept = place < column([p.top_k or probs.shape[-1] for p in params])
        ranked = ranked * kept
        share = ranked / ranked.sum(-1, keepdim=True)
        before = share.cumsum(-1) - share
        # A row at top_p 1 keeps everything, whatever rounding makes of its sum.
        limit = column([p.top_p if p.top_p < 1 else torch.inf for p in params])
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked * (before < limit))
    if any(p.min_p for p in params):
        least = column([p.min_p for p in params]) * probs.amax(-1, keepdim=True)
        probs = probs * (probs >= least)
    return probs


def choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """A token for each row, [B] int64 on the CPU.

    Args:
        logits: [B, V] fp32, of the model.
        rows: as many.
    """
    logits = penalised(masked(logits, rows), rows)
    chosen = logits.argmax(-1).cpu()
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if not drawn:
        return chosen
    some = logits if len(drawn) == len(rows) else logits[drawn]
    sums = filtered(some, [rows[i].params for i in drawn]).cumsum(-1)
    draws = torch.tensor([rows[i].uniform for i in drawn])
    # The first place whose sum exceeds the draw; a token of probability 0 exceeds nothing new.
    aims = draws.to(sums.device)[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, aims, right=True)[:, 0]
    last = (sums < sums[:, -1:]).sum(-1)  # where rounding put the draw at the very end
    chosen[torch.tensor(drawn)] = torch.minimum(found, last).cpu()
    return chosen


def scored(logits: Tensor, ids: Tensor, num_top: Sequence[int], version: str) -> list[Token]:
    """Tokens with their log-probabilities under the model itself.

    Args:
        logits: [B, V] fp32, untouched by any penalty or temperature.
        ids: [B] on the CPU.
        num_top: candidates that each row wants beside.
        version: of the weights.
    """
    normaliser = logits.logsumexp(-1)
    own = logits.gather(1, ids.to(logits.device)[:, None])[:, 0] - normaliser
    best = max(num_top, default=0)
    tops: list[tuple[Candidate, ...]] = [()] * len(ids)
    if best:
        values, places = logits.topk(min(best, logits.shape[-1]), -1)
        values = values - normaliser[:, None]
        tops = [
            tuple(map(Candidate, row_ids[:count], row_values[:count]))
            for row_ids, row_values, count in zip(
                places.tolist(), values.tolist(), num_top, strict=True
            )
        ]
    return [
        Token(token, logprob, top, version)
        for token, logprob, top in zip(ids.tolist(), own.tolist(), tops, strict=True)
    ]
