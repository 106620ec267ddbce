"""``WeightSource``: a live sharded model's weights, by Hugging Face's names, on one rank.

A round is collective. Every rank says which parts it holds; from that list all of them derive the
same buckets. For each bucket every rank that holds parts of it sends them, packed, to the root
(rank 0 of the group), once; the root joins them, merges adapters, and gives out whole tensors. No
side holds more than a bucket beside the model.

Prediction layers (MTP) stay with the trainer: engines here decode without them.
"""

import dataclasses
from collections.abc import Generator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.checkpoint.hf.quantization import BlockFp8
from megatron_k2.checkpoint.names.mapping import expand
from megatron_k2.engine.transfer.buckets import BUCKET_BYTES, grouped
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset
from megatron_k2.weight_sync.cargo import Cargo, cargo_of
from megatron_k2.weight_sync.packing import Place, places_of, room_for
from megatron_k2.weight_sync.pieces import Box, by_name, in_order, lora_scale, pieces_of

_ROOT = 0


class WeightSource:
    """The weights of a model in training.

    Args:
        stages: this rank's model, one for each virtual stage; wrapped or not.
        preset: its shape.
        dtype: to send in, what the engine holds; routers' selection biases stay fp32.
        fp8: which weights to give out in block FP8 instead, codes and scales by a release's names
            (``quantization_like``); no engine or transport here takes them.
        bucket_bytes: sent at once.
        group: ranks that together hold the model; ``None``: all.

    Raises:
        UserError: buckets of nothing, a dtype that no engine takes, or a frozen base in block FP8.
    """

    def __init__(
        self,
        stages: Sequence[torch.nn.Module],
        preset: ModelPreset,
        *,
        dtype: torch.dtype = torch.bfloat16,
        fp8: BlockFp8 | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if bucket_bytes < 1:
            raise UserError(f"buckets of {bucket_bytes} bytes: expected 1 or more")
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"weights in {dtype}: expected torch.float32 or torch.bfloat16")
        self._stages, self._dtype, self._fp8, self._bucket_bytes = stages, dtype, fp8, bucket_bytes
        self._preset = dataclasses.replace(preset, num_mtp_layers=0)
        self._group, self._lora_scale = group, lora_scale(stages)

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
        pairs = expand(self._preset)
        cargoes = [cargo_of(pair, parts, self._dtype, self._fp8) for pair in pairs]
        buckets = grouped(cargoes, lambda cargo: cargo.num_bytes, self._bucket_bytes)
        if not self.is_root:
            for bucket in buckets:
                self._send(self._packed_by(dist.get_rank(self._group), bucket, parts), mine)
            return
        try:
            for bucket in buckets:
                whole = self._received(bucket, parts, mine)
                for cargo in bucket:
                    own = {name: whole.pop(name) for name in cargo.names}
                    yield from cargo.given_out(own, self._lora_scale)
        except GeneratorExit:
            for bucket in buckets:
                self._received(bucket, parts, mine)
            raise

    def _packed_by(
        self, rank: int, bucket: list[Cargo], parts: Mapping[str, list[Box]]
    ) -> list[Place[Box]]:
        """Where a rank's parts of a bucket lie in what it sends."""
        return places_of(
            (box, cargo.dtype, box.shape)
            for cargo in bucket
            for name in cargo.names
            for box in parts[name]
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
        self, bucket: list[Cargo], parts: Mapping[str, list[Box]], mine: Mapping[Box, Tensor]
    ) -> dict[str, Tensor]:
        """A bucket's tensors, whole, by Megatron's names."""
        device = next(iter(mine.values())).device
        boxes = [box for cargo in bucket for name in cargo.names for box in parts[name]]
        coming = []
        for rank in sorted({box.rank for box in boxes} - {_ROOT}):
            places = self._packed_by(rank, bucket, parts)
            packed = room_for(places, device)
            handle = dist.irecv(packed, group=self._group, group_src=rank)
            coming.append((handle, packed, places))
        held = {box: mine[box] for box in boxes if box in mine}
        for handle, packed, places in coming:
            handle.wait()  # type: ignore[union-attr]  # None only for a rank outside the group
            held |= {place.key: place.of(packed) for place in places}
        return {
            name: _joined(parts[name], held, cargo.dtype)
            for cargo in bucket
            for name in cargo.names
        }


def _joined(boxes: list[Box], held: Mapping[Box, Tensor], dtype: torch.dtype) -> Tensor:
    if boxes[0].is_whole:
        return held[boxes[0]].to(dtype)
    whole = torch.empty(boxes[0].whole, dtype=dtype, device=held[boxes[0]].device)
    for box in boxes:
        box.of(whole).copy_(held[box])
    return whole
