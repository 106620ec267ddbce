"""``WeightSource``: a live sharded model's weights, by Hugging Face's names, on one rank.

A round is collective. Every rank says which parts it holds; from that list all of them derive the
same buckets. For each bucket every rank that holds parts of it sends them, packed, to the root
(rank 0 of the group), once; the root joins them and gives out whole tensors. No side holds more
than a bucket beside the model.

Prediction layers (MTP) stay with the trainer: engines here decode without them.
"""

import dataclasses
import math
from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.checkpoint.names.mapping import Pair, expand
from megatron_k2.engine.transfer.buckets import BUCKET_BYTES, grouped
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset
from megatron_k2.weight_sync.packing import Place, places_of, room_for
from megatron_k2.weight_sync.pieces import Box, by_name, in_order, pieces_of

_ROOT = 0


class WeightSource:
    """The weights of a model in training.

    Args:
        stages: this rank's model, one for each virtual stage; wrapped or not.
        preset: its shape.
        dtype: to send in, what the engine holds; routers' selection biases stay fp32.
        bucket_bytes: sent at once.
        group: ranks that together hold the model; ``None``: all.

    Raises:
        UserError: buckets of nothing, or a dtype that no engine takes.
    """

    def __init__(
        self,
        stages: Sequence[torch.nn.Module],
        preset: ModelPreset,
        *,
        dtype: torch.dtype = torch.bfloat16,
        bucket_bytes: int = BUCKET_BYTES,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if bucket_bytes < 1:
            raise UserError(f"buckets of {bucket_bytes} bytes: expected 1 or more")
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"weights in {dtype}: expected torch.float32 or torch.bfloat16")
        self._stages, self._dtype, self._bucket_bytes = stages, dtype, bucket_bytes
        self._preset = dataclasses.replace(preset, num_mtp_layers=0)
        self._group = group

    @property
    def is_root(self) -> bool:
        """Whether this rank is the one that gives tensors out."""
        return dist.get_rank(self._group) == _ROOT

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Ranks that take part."""
        return self._group

    @torch.no_grad()
    def tensors(self) -> Generator[tuple[str, Tensor], None, None]:
        """One round: every weight once, on the root; nothing on the others, which must draw too.

        Tensors share memory with the model or with what was received: copy what is kept.
        Whoever stops early receives, and drops, what is under way, so that no rank waits for it.

        Raises:
            UserError: the model is not the preset's; on every rank.
        """
        mine = dict(pieces_of(self._stages, dist.get_rank(self._group)))
        everyones: list[list[Box] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyones, list(mine), group=self._group)
        parts = by_name(in_order([box for boxes in everyones for box in boxes or ()]))
        pairs = list(expand(self._preset))
        _require_all(pairs, parts)
        buckets = grouped(pairs, self._num_bytes, self._bucket_bytes)
        if not self.is_root:
            for bucket in buckets:
                self._send(self._packed_by(dist.get_rank(self._group), bucket, parts), mine)
            return
        try:
            for bucket in buckets:
                whole = self._received(bucket, parts, mine)
                for pair in bucket:
                    yield from self._named(pair, whole.pop(pair.megatron))
        except GeneratorExit:
            for bucket in buckets:
                self._received(bucket, parts, mine)
            raise

    def _dtype_of(self, pair: Pair) -> torch.dtype:
        return torch.float32 if pair.rule.is_fp32 else self._dtype

    def _num_bytes(self, pair: Pair) -> int:
        return pair.num_elements * self._dtype_of(pair).itemsize

    def _packed_by(
        self, rank: int, bucket: list[Pair], parts: Mapping[str, list[Box]]
    ) -> list[Place[Box]]:
        """Where a rank's parts of a bucket lie in what it sends."""
        return places_of(
            (box, self._dtype_of(pair), box.shape)
            for pair in bucket
            for box in parts[pair.megatron]
            if box.rank == rank
        )

    def _send(self, places: list[Place[Box]], mine: Mapping[Box, Tensor]) -> None:
        if not places:
            return
        packed = room_for(places, mine[places[0].key].device)
        for place in places:
            place.of(packed).copy_(mine[place.key])
        dist.send(packed, group=self._group, group_dst=_ROOT)

    def _received(
        self, bucket: list[Pair], parts: Mapping[str, list[Box]], mine: Mapping[Box, Tensor]
    ) -> dict[str, Tensor]:
        """A bucket's tensors, whole, by Megatron's names."""
        device = next(iter(mine.values())).device
        senders = {box.rank for pair in bucket for box in parts[pair.megatron]} - {_ROOT}
        coming = []
        for rank in sorted(senders):
            places = self._packed_by(rank, bucket, parts)
            packed = room_for(places, device)
            handle = dist.irecv(packed, group=self._group, group_src=rank)
            coming.append((handle, packed, places))
        held = {box: mine[box] for pair in bucket for box in parts[pair.megatron] if box in mine}
        for handle, packed, places in coming:
            handle.wait()  # type: ignore[union-attr]  # None only for a rank outside the group
            held |= {place.key: place.of(packed) for place in places}
        return {pair.megatron: self._join(pair, parts[pair.megatron], held) for pair in bucket}

    def _join(self, pair: Pair, boxes: list[Box], held: Mapping[Box, Tensor]) -> Tensor:
        dtype = self._dtype_of(pair)
        if boxes[0].is_whole:
            return held[boxes[0]].to(dtype)
        whole = torch.empty(boxes[0].whole, dtype=dtype, device=held[boxes[0]].device)
        for box in boxes:
            box.of(whole).copy_(held[box])
        return whole

    def _named(self, pair: Pair, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        rows = tensor[: pair.megatron_shape[0]]  # without the vocabulary's padding
        yield from zip(pair.hf, pair.rule.operation.split(rows), strict=True)


def _require_all(pairs: Sequence[Pair], parts: Mapping[str, list[Box]]) -> None:
    """Every tensor of the preset, of its shape, each element from one rank.

    Raises:
        UserError: naming the first that is not so.
    """
    for pair in pairs:
        boxes = parts.get(pair.megatron)
        if not boxes:
            raise UserError(f"no rank holds '{pair.megatron}', which the preset calls for")
        whole = boxes[0].whole
        fits = whole[1:] == pair.megatron_shape[1:] and (
            whole[0] >= pair.megatron_shape[0]
            if pair.rule.is_vocabulary
            else whole[0] == pair.megatron_shape[0]
        )
        num_held = sum(math.prod(box.shape) for box in boxes)
        if not fits or num_held != math.prod(whole):
            raise UserError(
                f"'{pair.megatron}' is {list(whole)}, {num_held:,} elements of it on some rank; "
                f"the preset expects {list(pair.megatron_shape)}"
            )
