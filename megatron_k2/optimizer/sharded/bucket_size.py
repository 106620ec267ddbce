"""How many elements are exchanged and orthogonalised together: Megatron's bucket size. No torch."""

MIN_BUCKET_ELEMENTS = 40_000_000
"""Megatron's smallest; also what MuonClip without ZeRO, which has no buckets, takes together."""


def default_bucket_size(data_ranks: int) -> int:
    """Elements; Megatron's, with ``--overlap-grad-reduce`` (training.py:1562).

    Args:
        data_ranks: that share a buffer: data x context parallel, or the expert-data-parallel ones.
    """
    return max(MIN_BUCKET_ELEMENTS, 1_000_000 * data_ranks)
