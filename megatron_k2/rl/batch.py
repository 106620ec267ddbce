"""Groups of answers as packed micro-batches: which answers count, where they lie, what a row knows.

A step's batch is planned whole, on every rank alike, before any forward pass: advantages and
weights, then packs by best fit, then which data-parallel rank takes which pack. A document is one
trajectory and is never cut, since the sequence form squares a sum over all of it. A trajectory of
n tokens takes n - 1 rows: the row that reads a token is asked for the next one, and what is known
of that next token (who drew it, with which weights, how likely) lies with the row.

Answers to one prompt share its rows, where the model can (``Room.shares_prompts``): all of them but
that of its last token, which each answer asks for another token. Of K answers of n tokens to a
prompt of p this leaves p + K n rows of K (p + n), with the same loss and the same gradient.

Packs of the PTX stream lie among the others, and a critic's lessons: rows with a weight of the NLL
and of no answer.

Left out are groups that are dead, answers without a reward (``objective.advantages``), and answers
of which no token is trained on; all of them would have a gradient of exactly zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_k2.errors import UserError
from megatron_k2.rl.bundles import Answer, Bundle, bundled
from megatron_k2.rl.objective import advantages
from megatron_k2.rl.record import Group, Segment, Trajectory
from megatron_k2.sft.dataset import Pack
from megatron_k2.sft.packing import pack


@dataclass(frozen=True)
class Source:
    """What one pack holds: answers, or a pack of dialogues; neither: rows of padding."""

    bundles: tuple[Bundle, ...] = ()
    dialogues: Pack | None = None
    is_lesson: bool = False
    """Whether they are a critic's lessons; else they are of the PTX stream."""

    @property
    def answers(self) -> tuple[Answer, ...]:
        """In the order in which they lie."""
        return tuple(answer for bundle in self.bundles for answer in bundle.answers)

    @property
    def num_tokens(self) -> int:
        """Rows that are not padding."""
        if self.dialogues is not None:
            return int(self.dialogues.lengths.sum()) - len(self.dialogues.lengths)
        return sum(each.num_rows for each in self.bundles)

    @property
    def num_saved(self) -> int:
        """Rows more that it would have if no answer shared any."""
        return sum(each.num_shared * (len(each.answers) - 1) for each in self.bundles)

    @property
    def num_targets(self) -> int:
        """Tokens that are asked for."""
        if self.dialogues is not None:
            return _num_targets(self.dialogues)
        return sum(each.num_trained for each in self.answers)


IDLE = Source()
"""Of a rank that has fewer packs: all padding, so in no loss, no router load, no S_max."""


@dataclass(frozen=True)
class Batch:
    """What one optimizer step learns from; the same on every rank."""

    shares: tuple[tuple[Source, ...], ...]
    """Packs of each data-parallel rank, as many on each."""
    sizes: tuple[int, ...]
    """Rows of the n-th pack of each rank: the room's, or as many as the fullest of them needs."""
    num_groups: int
    num_live_groups: int
    num_answers: int
    num_trained: int
    """Tokens in the answers' masks."""
    num_ptx_targets: int
    num_lesson_targets: int
    num_tokens: int
    """Rows that are not padding, of all packs."""
    num_saved: int
    """Rows more that there would be if no answer shared its prompt's."""
    version: int
    """Of the weights that are pi_old."""

    @property
    def is_live(self) -> bool:
        """Whether a step may be taken; never for the sake of dialogues alone."""
        return self.num_live_groups > 0 and self.num_trained > 0

    @property
    def num_targets(self) -> int:
        """What Megatron divides gradients by."""
        return self.num_trained + self.num_ptx_targets + self.num_lesson_targets


@dataclass(frozen=True)
class Room:
    """What packs are made for."""

    num_rows: int
    """s of a pack: ``--seq-length``."""
    num_ranks: int = 1
    """Data-parallel, without context-parallel ones."""
    multiple: int = 1
    """Rows of a document are a multiple of it: ``sft.sets.row_multiple``."""
    count_multiple: int = 1
    """Packs of a rank are: pipeline stages where the schedule interleaves virtual ones."""
    shares_prompts: bool = False
    """Whether answers to one prompt share its rows; with a multiple of 1 alone."""
    unit: int = 0
    """Packs end behind the last row that one of them needs, in such units; with a multiple of 1
    alone. 0: all have ``num_rows``."""


def plan(
    groups: Sequence[Group],
    room: Room,
    version: int,
    *,
    keeps_old: bool = False,
    ptx: Sequence[Pack] = (),
    lessons: Sequence[Pack] = (),
) -> Batch:
    """One step's batch.

    Args:
        groups: that it learns from; their order decides no number.
        room: of packs.
        version: of the weights that are pi_old: the trainer's now.
        keeps_old: whether tokens that older versions drew are trained on (the token forms), or
            masked (the sequence form; K1.5 allows it, the report does not say).
        ptx: packs of curated data; of no use in a batch without a live group.
        lessons: a critic's, likewise.

    Raises:
        UserError: a trajectory longer than a pack, or of a version that is not yet.
    """
    answers, num_live = _answers(groups, version, keeps_old)
    taken = [each for each in answers if each.num_trained]
    sources = [Source(found) for found in _packed(taken, room)]
    curated = [Source(dialogues=each) for each in ptx] if taken else []
    taught = [Source(dialogues=each, is_lesson=True) for each in lessons] if taken else []
    sources += curated + taught
    shares = _shares(sources, room)
    return Batch(
        shares=shares,
        sizes=tuple(_size(each, room) for each in zip(*shares, strict=True)),
        num_groups=len(groups),
        num_live_groups=num_live,
        num_answers=len(answers),
        num_trained=sum(each.num_trained for each in taken),
        num_ptx_targets=sum(each.num_targets for each in curated),
        num_lesson_targets=sum(each.num_targets for each in taught),
        num_tokens=sum(each.num_tokens for each in sources),
        num_saved=sum(each.num_saved for each in sources),
        version=version,
    )


def _answers(groups: Sequence[Group], version: int, keeps_old: bool) -> tuple[list[Answer], int]:
    """Judged answers of live groups, and how many such groups there are."""
    judged = [(i, each) for i, group in enumerate(groups) for each in group.judged]
    if not judged:
        return [], 0
    rewards = torch.tensor([each.reward for _, each in judged], dtype=torch.float64)
    found = advantages(rewards, torch.tensor([i for i, _ in judged]))
    rows = zip(
        (each for _, each in judged), found.values.tolist(), found.weights.tolist(), strict=True
    )
    answers = [
        Answer(trajectory, value, weight, _num_trained(trajectory, version, keeps_old))
        for trajectory, value, weight in rows
        if weight > 0
    ]
    return answers, found.num_live_groups


def _num_trained(trajectory: Trajectory, version: int, keeps_old: bool) -> int:
    for segment in trajectory.segments:
        if segment.weight_version > version:
            raise UserError(
                f"tokens of weight version {segment.weight_version}, the trainer is at {version}: "
                "expected none of later weights; the rollouts are of another run"
            )
    kept = (segment for segment in trajectory.segments if is_kept(segment, version, keeps_old))
    return sum(len(segment.token_ids) for segment in kept)


def is_kept(segment: Segment, version: int, keeps_old: bool) -> bool:
    """Whether a segment's tokens are in their answer's mask."""
    return segment.is_sampled and (keeps_old or segment.weight_version == version)


def _packed(answers: Sequence[Answer], room: Room) -> list[tuple[Bundle, ...]]:
    """Best fit, of answers that are never cut."""
    lengths = np.array([len(each.trajectory.token_ids) for each in answers], np.int64)
    if (
        longest := int(lengths.max(initial=0)) - 1
    ) > room.num_rows // room.multiple * room.multiple:
        raise UserError(
            f"an answer of {longest + 1:,} tokens with its prompt: a pack has {room.num_rows:,} "
            "rows and an answer is not cut; raise --seq-length, or shorten answers"
        )
    if room.shares_prompts:
        return bundled(answers, room.num_rows)
    if not answers:
        return []
    packs = pack(lengths, room.num_rows, multiple=room.multiple)
    return [tuple(Bundle((answers[i],)) for i in packs[n]) for n in range(len(packs))]


def _shares(sources: Sequence[Source], room: Room) -> tuple[tuple[Source, ...], ...]:
    """Longest first, to the rank with the fewest tokens that has room for a pack."""
    most = math.ceil(len(sources) / room.num_ranks)
    most = math.ceil(most / room.count_multiple) * room.count_multiple
    ranks: list[list[Source]] = [[] for _ in range(room.num_ranks)]
    loads = [0] * room.num_ranks
    for source in sorted(sources, key=lambda each: -each.num_tokens):
        open_ranks = [rank for rank in range(room.num_ranks) if len(ranks[rank]) < most]
        rank = min(open_ranks, key=lambda each: (loads[each], each))
        ranks[rank].append(source)
        loads[rank] += source.num_tokens
    return tuple((*each, *[IDLE] * (most - len(each))) for each in ranks)


def _size(sources: Sequence[Source], room: Room) -> int:
    """Rows of packs that are computed at once: the same, for what ranks exchange."""
    if not room.unit:
        return room.num_rows
    needed = max(1, *(source.num_tokens for source in sources))
    return min(-(-needed // room.unit) * room.unit, room.num_rows)


def _num_targets(dialogues: Pack) -> int:
    """Tokens that are asked for: a document's first one never is."""
    firsts = np.cumsum([0, *map(int, dialogues.lengths[:-1])])
    return int((dialogues.loss_mask > 0).sum() - (dialogues.loss_mask[firsts] > 0).sum())
