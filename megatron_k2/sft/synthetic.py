"""A small chat set made on the spot, for recipes' twins: numbers to repeat, no text.

A sample is a question of a few tokens and an answer of the same tokens, which is the target: a
model that attends to the question can learn it, one that does not stays at the answer's entropy.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from megatron_k2.data.manifest import TokenizerRecord
from megatron_k2.files import sha256_of_json
from megatron_k2.sft.manifest import (
    MANIFEST_FILE,
    ChatManifest,
    PackingRecord,
    SourceRecord,
    SplitRecord,
    write_manifest,
)

NUM_SAMPLES = 2000
SHORTEST, LONGEST = 4, 20
"""Tokens of a question; a sample is twice that and a separator."""
NUM_WORDS = 64
"""Ids that questions are made of, so that a small model sees each often."""


def write_echo_set(directory: Path, vocab_size: int, eod_id: int, seed: int = 0) -> None:
    """Write a training split into ``directory`` unless a set is there.

    Args:
        directory: of the set.
        vocab_size: ids.
        eod_id: separates question and answer.
        seed: of the questions.
    """
    if (directory / MANIFEST_FILE).exists():
        return
    own = directory.with_name(f".{directory.name}.{os.getpid()}")  # another run may be at it, too
    own.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    words = random.permutation(np.delete(np.arange(vocab_size), eod_id))[:NUM_WORDS]
    questions = [random.choice(words, n) for n in random.integers(SHORTEST, LONGEST, NUM_SAMPLES)]
    samples = [np.concatenate([question, [eod_id], question]) for question in questions]
    masks = [np.arange(len(one)) > len(one) // 2 for one in samples]
    arrays: dict[str, np.ndarray] = {
        "tokens": np.concatenate(samples).astype(np.int32),
        "mask": np.concatenate(masks).astype(np.uint8),
        "offsets": np.concatenate([[0], np.cumsum([len(one) for one in samples])]),
        "weights": np.ones(NUM_SAMPLES, np.float32),
    }
    for name, array in arrays.items():
        np.save(own / f"train.{name}.npy", array)
    files = {path.name: path.stat().st_size for path in sorted(own.glob("*.npy"))}
    num_tokens, num_targets = len(arrays["tokens"]), int(arrays["mask"].sum())
    content = sha256_of_json(["echo", vocab_size, eod_id, seed, num_tokens])
    write_manifest(
        own,
        ChatManifest(
            tokenizer=TokenizerRecord("none", ".", content, vocab_size, eod_id),
            template={},
            splits={"train": SplitRecord(NUM_SAMPLES, num_tokens, num_targets, 0, 1.0, files)},
            packing=PackingRecord(2 * LONGEST, 1, "best-fit", "refuse"),
            source=SourceRecord("numbers to repeat", 0, 0, NUM_SAMPLES, {}, 0, content),
            plan_sha256=content,
        ),
    )
    try:
        own.rename(directory)
    except OSError:  # it was faster, or something else lies there, which the reader will name
        shutil.rmtree(own)
