"""Which layers each pipeline rank holds, by virtual stage, and Megatron's spelling of it.

The report (section 2.4.2) says 16 pipeline stages with virtual stages and not how 61 layers are
split. Ours: units are spread evenly over the ``pp x vpp`` chunks, where a layer and the embedding
are one unit each and the head two (its product is 2.3 layers' arithmetic at 4k tokens). For K2 that
is 64 units, four a rank of 16. Chunks one short go to each rank in turn, the first rank first,
whose activations live longest.
"""

import functools
from dataclasses import dataclass

from megatron_k2.errors import UserError

EMBEDDING_UNITS, HEAD_UNITS = 1, 2


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on one rank: virtual stage ``virtual`` of pipeline rank ``rank``."""

    rank: int
    virtual: int
    layers: range
    has_embedding: bool
    has_head: bool

    @property
    def units(self) -> int:
        """The chunk's size as it is spread evenly: a layer and the embedding 1, the head 2."""
        ends = EMBEDDING_UNITS * self.has_embedding + HEAD_UNITS * self.has_head
        return len(self.layers) + ends


@functools.cache
def split_into_chunks(num_layers: int, pp: int, vpp: int = 1) -> tuple[Chunk, ...]:
    """Every chunk in the order a token passes through them.

    Raises:
        UserError: where some chunk would be empty.
    """
    count = pp * vpp
    size, longer = divmod(num_layers + EMBEDDING_UNITS + HEAD_UNITS, count)
    lengths = [size + 1] * count if longer else [size] * count
    # The head keeps its two units, so its rank is the first to be short elsewhere.
    order = [v * pp + rank for v in reversed(range(1, vpp)) for rank in range(pp)]
    order += [pp - 1, *range(pp - 1)]
    order.sort(key=lambda index: index == count - 1)
    for index in order[: count - longer] if longer else []:
        lengths[index] -= 1
    lengths[0] -= EMBEDDING_UNITS
    lengths[-1] -= HEAD_UNITS
    if min(lengths) < 0 or 0 in lengths[1:-1]:
        most = max(1, (num_layers + EMBEDDING_UNITS) // pp)
        raise UserError(
            f"{num_layers} layers do not fill {pp} pipeline ranks x {vpp} virtual stages; "
            + (f"at most --vpp {most}" if most < vpp else f"take fewer ranks than {pp}")
        )
    chunks, start = [], 0
    for index, length in enumerate(lengths):
        chunks.append(
            Chunk(
                rank=index % pp,
                virtual=index // pp,
                layers=range(start, start + length),
                has_embedding=index == 0,
                has_head=index == count - 1,
            )
        )
        start += length
    return tuple(chunks)


def distinct_ranks(chunks: tuple[Chunk, ...], num_dense_layers: int) -> dict[int, tuple[int, ...]]:
    """Pipeline rank -> all ranks that hold as many layers of each kind, in each virtual stage."""
    alike: dict[tuple[tuple[int, int, bool, bool], ...], list[int]] = {}
    for rank in sorted({chunk.rank for chunk in chunks}):
        key = tuple(
            (
                sum(layer >= num_dense_layers for layer in chunk.layers),
                sum(layer < num_dense_layers for layer in chunk.layers),
                chunk.has_embedding,
                chunk.has_head,
            )
            for chunk in chunks
            if chunk.rank == rank
        )
        alike.setdefault(key, []).append(rank)
    return {ranks[0]: tuple(ranks) for ranks in alike.values()}


def megatron_layout(chunks: tuple[Chunk, ...]) -> str:
    """``--pipeline-model-parallel-layout``: E, t for each layer, L; ``|`` between chunks."""
    return "|".join(
        "E" * chunk.has_embedding + "t" * len(chunk.layers) + "L" * chunk.has_head
        for chunk in chunks
    )
