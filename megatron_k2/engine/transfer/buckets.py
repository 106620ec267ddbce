"""Tensors in buckets of a stated size: what travels at once, and what has to be held for it."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from megatron_k2.errors import UserError

BUCKET_BYTES = 256 << 20
"""Unless said otherwise: large against what a transfer costs to start, small against a model."""


def grouped[Item](
    items: Iterable[Item], num_bytes: Callable[[Item], int], bucket_bytes: int
) -> Iterator[list[Item]]:
    """Items in order, up to ``bucket_bytes`` at once; one that is larger goes alone.

    Raises:
        UserError: buckets of nothing.
    """
    if bucket_bytes < 1:
        raise UserError(f"buckets of {bucket_bytes} bytes: expected 1 or more")
    bucket: list[Item] = []
    size = 0
    for item in items:
        more = num_bytes(item)
        if bucket and size + more > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += more
    if bucket:
        yield bucket


def buckets_of(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """``grouped``, of names and tensors."""
    return grouped(tensors, lambda named: named[1].numel() * named[1].itemsize, bucket_bytes)
