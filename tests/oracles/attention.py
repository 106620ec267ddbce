"""Attention as one einsum with the whole logit matrix, in fp64, differentiated by autograd."""

import torch
from torch import Tensor


def forbidden_causal(num_rows: int, num_keys: int, first_position: int = 0) -> Tensor:
    """True where key j lies after query row i, which stands at ``first_position + i``."""
    rows = torch.arange(num_rows)[:, None] + first_position
    return torch.arange(num_keys)[None, :] > rows


def forbidden_across_documents(lengths: list[int]) -> Tensor:
    """Causal, and no token sees another document's: [s, s]."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    across = document[:, None] != document[None, :]
    return across | forbidden_causal(len(document), len(document))


def einsum_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, forbidden: Tensor
) -> tuple[Tensor, Tensor]:
    """q [b, h, s, d], k [b, h, s_k, d], v [b, h, s_k, d_v] -> output fp64, S_max [h] fp64."""
    q, k, v = q.double(), k.double(), v.double()
    logits = scale * torch.einsum("bhid,bhjd->bhij", q, k)
    logits = logits.masked_fill(forbidden, -torch.inf)
    weights = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    out = torch.einsum("bhij,bhje->bhie", weights, v)
    return out, logits.detach().amax((0, 2, 3))


def attention_that_peeks_one_token_ahead(
    q: Tensor, k: Tensor, v: Tensor, scale: float, forbidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Deliberately wrong: the diagonal is off by one."""
    shifted = torch.zeros_like(forbidden)
    shifted[:, 1:] = forbidden[:, :-1]
    return einsum_attention(q, k, v, scale, shifted)
