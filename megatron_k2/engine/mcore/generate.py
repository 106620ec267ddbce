"""Text from a model at any layout, one whole forward pass a token.

Recomputing costs O(s) forward tokens for each new one; it needs no cache and is the same arithmetic
as training. ``engine/local`` decodes over a cache and serves; this is its oracle.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_k2.data.tokenizer import Tokenizer
from megatron_k2.engine.mcore.jobs import check_length, round_up
from megatron_k2.engine.mcore.model import InferenceModel
from megatron_k2.engine.text import INCOMPLETE
from megatron_k2.parallel.layout import Layout


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next token.

    Args:
        logits: [V] fp32.
        temperature: 0 takes the largest logit, the first of equals.
        top_p: draw from the fewest most likely tokens whose probabilities reach this sum.
        generator: of the CPU, at the same state on every rank.
    """
    if temperature == 0:
        return int(logits.argmax())
    # On the CPU in fp64, so that the draw does not depend on the device.
    probs = (logits.double().cpu() / temperature).softmax(-1)
    probs, order = probs.sort(descending=True, stable=True)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= top_p, 0)
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def generate(
    model: InferenceModel,
    prompt: list[int],
    *,
    layout: Layout,
    max_new_tokens: int,
    device: torch.device,
    eod_id: int | None = None,
    temperature: float = 0.6,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """New tokens one by one, the same on every rank; ends after ``eod_id``.

    Every rank must draw from the iterator as long as the others do.
    """
    check_length(len(prompt), max_new_tokens, model.max_length)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_new_tokens):
        # Causal, and no expert drops tokens: what stands behind the last token changes nothing.
        padded = ids + [0] * (round_up(len(ids), layout) - len(ids))
        tokens = torch.tensor([padded], device=device)
        last = slice(len(ids) - 1, len(ids))
        token = choose(model.whole_logits(tokens, last)[0, 0], temperature, top_p, generator)
        ids.append(token)
        yield token
        if token == eod_id:
            return


def greedy(
    model: InferenceModel,
    prompts: Sequence[list[int]],
    *,
    layout: Layout,
    max_new_tokens: int,
    device: torch.device,
    eod_id: int,
) -> list[list[int]]:
    """The most likely tokens after each prompt, all prompts in one batch.

    Args:
        model: at any layout.
        prompts: of any lengths.
        layout: of the model.
        max_new_tokens: for each.
        device: of this rank.
        eod_id: ends a row, itself included.

    Returns:
        New tokens of each prompt, the same on every rank.
    """
    check_length(max(map(len, prompts)), max_new_tokens, model.max_length)
    rows = [list(prompt) for prompt in prompts]
    going = list(range(len(rows)))
    for _ in range(max_new_tokens):
        longest = max(len(rows[i]) for i in going)
        first = min(len(rows[i]) for i in going) - 1
        tokens = torch.zeros(len(going), round_up(longest, layout), dtype=torch.long)
        for place, i in enumerate(going):
            tokens[place, : len(rows[i])] = torch.tensor(rows[i])
        logits = model.whole_logits(tokens.to(device), slice(first, longest))
        for place, i in enumerate(going):
            rows[i].append(int(logits[place, len(rows[i]) - 1 - first].argmax()))
        going = [i for i in going if rows[i][-1] != eod_id]
        if not going:
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def text_pieces(tokenizer: Tokenizer, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """Text of new tokens as soon as its characters are whole.

    Everything is decoded anew for each token: what a token adds depends on those before it.
    """
    ids, shown = list(prompt), len(tokenizer.decode(prompt))
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(INCOMPLETE):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]
