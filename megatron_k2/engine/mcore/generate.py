"""Text from a model at any layout, one whole forward pass a token.

Recomputing costs O(s) forward tokens for each new one; it needs no cache and is the same arithmetic
as training. For a model that is spread over ranks; ``engine/local`` decodes over a cache, and this
is its oracle.
"""

from collections.abc import Iterator, Sequence

import torch

from megatron_k2.engine.local.sampling import Row, choose, uniform
from megatron_k2.engine.mcore.jobs import round_up
from megatron_k2.engine.mcore.model import InferenceModel
from megatron_k2.engine.protocol import SamplingParams
from megatron_k2.parallel.layout import Layout


def generate(
    model: InferenceModel,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    layout: Layout,
    device: torch.device,
) -> Iterator[int]:
    """New tokens one by one, the same on every rank; drawn as ``engine/local`` draws them.

    Every rank must draw from the iterator as long as the others do.
    """
    ids = list(prompt)
    seed = params.seed or 0  # one that each rank drew for itself would not be the same
    for _ in range(params.max_tokens):
        # Causal, and no expert drops tokens: what stands behind the last token changes nothing.
        padded = ids + [0] * (round_up(len(ids), layout) - len(ids))
        tokens = torch.tensor([padded], device=device)
        # Sampled on the CPU: every rank must draw the same, and a GPU's sums need not be.
        logits = model.whole_logits(tokens, slice(len(ids) - 1, len(ids)))[0].cpu()
        token = int(choose(logits, [Row(params, uniform(seed, len(ids)), ids)]))
        ids.append(token)
        yield token
        if token in params.stop_token_ids:
            return
