"""One part of a preparation: rows to samples, to ids and mask, to one ``.npz``.

Nothing here decides between samples of different parts; duplicates are told by ``prepare.py``, from
the hashes that stand in every part. Imports neither torch nor Megatron; a worker starts in about a
second.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from megatron_k2.chat.call_ids import number_calls
from megatron_k2.chat.template import Format, Renderer
from megatron_k2.data.indexed import token_dtype
from megatron_k2.data.parts import Part
from megatron_k2.data.pool import worker_tokenizer
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.records.messages import ChatSample, Message
from megatron_k2.sft.forms import sample_of
from megatron_k2.sft.rows import Row, line_numbers, read_rows

TooLong = Literal["drop", "truncate", "refuse"]
TOO_LONG: tuple[str, ...] = get_args(TooLong)
Trained = Literal["all", "last"]
TRAINED: tuple[str, ...] = get_args(Trained)
CallIds = Literal["number", "keep"]
CALL_IDS: tuple[str, ...] = get_args(CallIds)


@dataclass(frozen=True)
class Rules:
    """How a sample becomes tokens."""

    form: Format
    sequence_length: int
    """Positions; a sample may have one token more."""
    too_long: TooLong
    trained: Trained
    """Every assistant's turn, or the last one alone."""
    call_ids: CallIds
    """Numbered as K2's, or kept as they are."""


@dataclass(frozen=True)
class Reject:
    """A row that is left out."""

    kind: str
    """A word to count by: ``invalid``, ``too_long``, ``untrained``, ``duplicate``."""
    span: int
    place: int
    """See ``rows.Row``."""
    reason: str


@dataclass(frozen=True)
class PartSamples:
    """A finished part, as read back."""

    hashes: np.ndarray
    """[n, 16] uint8: the first half of each sample's content hash."""
    places: np.ndarray
    """[n, 2] int64: span and place of each."""
    lengths: np.ndarray
    """[n] int64: tokens of each."""
    weights: np.ndarray
    """[n] float32."""
    num_read: int
    num_truncated: int
    rejects: list[Reject]
    sha256: str
    """Over everything above and the tokens and masks."""
    path: Path

    def tokens_and_mask(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all its samples, one after another."""
        with np.load(self.path, allow_pickle=False) as arrays:
            return arrays["tokens"], arrays["mask"]


@dataclass
class _Collected:
    """What a part has so far."""

    ids: list[np.ndarray]
    masks: list[np.ndarray]
    hashes: list[bytes]
    places: list[tuple[int, int]]
    weights: list[float]
    rejects: list[Reject]
    num_read: int = 0
    num_truncated: int = 0


class _RejectedError(ValueError):
    """A sound sample that is left out; its first argument is the kind."""


def only_last_trained(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The dialogue with every assistant's turn but the last as context."""
    turns = [number for number, message in enumerate(messages) if message.role == "assistant"]
    return tuple(
        replace(message, is_trained=False) if number in turns[:-1] else message
        for number, message in enumerate(messages)
    )


def ruled(sample: ChatSample, rules: Rules) -> ChatSample:
    """The sample as it is trained: calls numbered, turns that do not count as context.

    Two rows that differ only in what the rules change are one dialogue.

    Raises:
        ValueError: a tool's result answers no call.
    """
    messages = sample.messages
    if rules.call_ids == "number" and any(m.role == "tool" or m.tool_calls for m in messages):
        messages = number_calls(messages)
    if rules.trained == "last":
        messages = only_last_trained(messages)
    return sample if messages is sample.messages else replace(sample, messages=messages)


def encode_sample(
    sample: ChatSample, renderer: Renderer, rules: Rules
) -> tuple[list[int], list[int], bool]:
    """Ids, loss mask, and whether they were cut to the sequence.

    Raises:
        ValueError: the sample cannot be written, is too long, or trains nothing.
    """
    rendered = renderer.render(sample.messages, sample.tools)
    ids, mask = rendered.ids, rendered.loss_mask
    longest = rules.sequence_length + 1
    if not any(mask):
        raise _RejectedError("untrained", "no token to train on: no assistant's turn that counts")
    if len(ids) <= longest:
        return ids, mask, False
    found = f"{len(ids):,} tokens, a sequence holds {longest:,}"
    if rules.too_long == "refuse":
        raise _RejectedError(
            "too_long", f"{found}; choose --too-long drop or truncate, or a longer one"
        )
    if rules.too_long == "drop" or not any(mask[:longest]):
        raise _RejectedError("too_long", found)
    return ids[:longest], mask[:longest], True


def tokenize_part(
    part: Part, tokenizer_directory: Path, identity: str, rules: Rules, directory: Path
) -> int:
    """Make a part's ``.npz``; returns its input bytes.

    Raises:
        UserError: a file cannot be read, or a sample is too long and the rules refuse that.
    """
    tokenizer = worker_tokenizer(tokenizer_directory, identity)
    renderer = Renderer(tokenizer, rules.form)
    dtype = token_dtype(tokenizer.vocab_size)
    found = _Collected([np.zeros(0, dtype)], [np.zeros(0, np.uint8)], [], [], [], [])
    for number, row in _rows(part):
        found.num_read += 1
        try:
            if row.value is None:
                raise ValueError(row.problem)
            sample = ruled(sample_of(row.value), rules)
            ids, mask, is_cut = encode_sample(sample, renderer, rules)
        except ValueError as problem:
            found.rejects.append(_reject(part, number, row, problem, rules))
            continue
        found.num_truncated += is_cut
        found.ids.append(np.array(ids, dtype=dtype))
        found.masks.append(np.array(mask, dtype=np.uint8))
        found.hashes.append(bytes.fromhex(sample.content_hash)[:16])
        found.places.append((number, row.place))
        found.weights.append(sample.weight)
    _write(found, part.path(directory))
    return part.num_bytes


def _rows(part: Part) -> Iterator[tuple[int, Row]]:
    for number, span in enumerate(part.spans):
        for row in read_rows(span):
            yield number, row


def _reject(part: Part, span: int, row: Row, problem: ValueError, rules: Rules) -> Reject:
    kind, reason = (
        problem.args if isinstance(problem, _RejectedError) else ("invalid", str(problem))
    )
    if kind == "too_long" and rules.too_long == "refuse":
        file = part.spans[span].file
        raise UserError(f"{file.path}:{line_numbers(file, [row.place])[row.place]}: {reason}")
    return Reject(kind, span, row.place, reason)


def _write(found: _Collected, path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "tokens": np.concatenate(found.ids),
        "mask": np.concatenate(found.masks),
        "lengths": np.array([len(ids) for ids in found.ids[1:]], dtype=np.int64),
        "hashes": np.frombuffer(b"".join(found.hashes), dtype=np.uint8).reshape(-1, 16),
        "places": np.array(found.places, dtype=np.int64).reshape(-1, 2),
        "weights": np.array(found.weights, dtype=np.float32),
        "counts": np.array([found.num_read, found.num_truncated]),
        "rejects": np.frombuffer(
            json.dumps([vars(reject) for reject in found.rejects]).encode(), dtype=np.uint8
        ),
    }
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(hashlib.sha256(arrays[name].tobytes()).digest())
    arrays["sha256"] = np.frombuffer(digest.digest(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def read_part(part: Part, directory: Path) -> PartSamples:
    """A finished part, its tokens left on disk."""
    path = part.path(directory)
    with np.load(path, allow_pickle=False) as arrays:
        num_read, num_truncated = arrays["counts"].tolist()
        return PartSamples(
            hashes=arrays["hashes"],
            places=arrays["places"],
            lengths=arrays["lengths"],
            weights=arrays["weights"],
            num_read=num_read,
            num_truncated=num_truncated,
            rejects=[Reject(**found) for found in json.loads(arrays["rejects"].tobytes())],
            sha256=arrays["sha256"].tobytes().hex(),
            path=path,
        )
