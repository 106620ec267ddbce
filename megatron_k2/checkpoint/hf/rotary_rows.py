"""Rotary rows that lie in halves, as ``rope_interleave: false`` says, brought into pairs.

K2's release and Megatron's MLA turn rows 2i and 2i + 1 of a head's rotary part together (pairs); a
model whose ``config.json`` says false turns rows i and i + d / 2 (halves). The rows are the same
ones in another order: pair row 2i is half row i, pair row 2i + 1 is half row i + d / 2.
"""

import functools
import re

import numpy as np

from megatron_k2.checkpoint.block_fp8.layout import BLOCK
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.errors import UserError

_QUERY = re.compile(r".*\.self_attn\.(q_b_proj|q_proj)\.weight")
_KEY = re.compile(r".*\.self_attn\.kv_a_proj_with_mqa\.weight")


def order_of(name: str, num_rows: int, rotary: int, head: int) -> np.ndarray | None:
    """Row of the release at each place of the weight in pairs; ``None`` for one without such rows.

    So is one whose rows are no whole heads: the audit names it.

    Args:
        name: Hugging Face's.
        num_rows: of the weight.
        rotary: rotary rows of a head, at its end.
        head: all rows of a query's head.
    """
    if _QUERY.fullmatch(name):
        period = head
    elif _KEY.fullmatch(name):
        period = num_rows
    else:
        return None
    if rotary > period or num_rows % period:
        return None
    order = np.arange(num_rows)
    for begin in range(period - rotary, num_rows, period):
        halves = order[begin : begin + rotary].reshape(2, -1)
        order[begin : begin + rotary] = halves.T.reshape(-1).copy()
    return order


def in_pairs(source: HfSource) -> bool:
    """Have ``source`` read rotary rows in pairs, where its ``config.json`` says they lie in halves.

    Returns:
        Whether they did.

    Raises:
        UserError: for sizes that are none, and for block FP8 whose rotary rows are in two rows of
            blocks, which have scales of their own.
    """
    if source.config.get("rope_interleave", True):  # as transformers asks
        return False
    rotary, rest = (source.config.get(f"qk_{part}_head_dim") for part in ("rope", "nope"))
    if type(rotary) is not int or type(rest) is not int or rotary <= 0 or rotary % 2 or rest < 0:
        raise UserError(
            f"{source.directory / 'config.json'}: qk_rope_head_dim={rotary!r}, "
            f"qk_nope_head_dim={rest!r}; of rotary rows in halves an even number is expected"
        )
    head = rest + rotary
    find = functools.partial(order_of, rotary=rotary, head=head)
    source.orders = {
        name: order
        for name, tensor in source.stored.items()
        if (order := find(name, tensor.shape[0] if tensor.shape else 0)) is not None
    }
    for name, order in source.orders.items():
        stays = np.array_equal(order // BLOCK, np.arange(len(order)) // BLOCK)
        if source.stored[name].dtype is Dtype.E4M3 and not stays:
            raise UserError(
                f"{source.directory}: rope_interleave is false, and '{name}' is FP8 with rotary "
                "rows in two rows of blocks, whose scales differ; take a bf16 release"
            )
    return True
