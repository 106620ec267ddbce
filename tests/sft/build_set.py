"""A small chat set on disk from numbers, as ``megatron-k2 data chat`` would leave it."""

from pathlib import Path

import numpy as np

from megatron_k2.data.manifest import TokenizerRecord
from megatron_k2.files import sha256_of_json
from megatron_k2.sft.manifest import (
    ChatManifest,
    PackingRecord,
    SourceRecord,
    SplitRecord,
    write_manifest,
)

VOCAB_SIZE = 128


def write_set(directory: Path, num_samples: int = 60, seed: int = 0, splits=("train",)) -> Path:
    """Dialogues of random tokens, 4 to 60 long, of which the second half are targets."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    records = {}
    for split in splits:
        lengths = random.integers(4, 61, num_samples)
        tokens = random.integers(1, VOCAB_SIZE, int(lengths.sum())).astype(np.uint16)
        mask = np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.uint8)
        arrays = {
            "tokens": tokens,
            "mask": mask,
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "weights": np.ones(num_samples, np.float32),
        }
        for name, array in arrays.items():
            np.save(directory / f"{split}.{name}.npy", array)
        files = {p.name: p.stat().st_size for p in directory.glob(f"{split}.*.npy")}
        records[split] = SplitRecord(num_samples, len(tokens), int(mask.sum()), 1, 1.0, files)
    content = sha256_of_json([seed, num_samples, list(splits)])
    write_manifest(
        directory,
        ChatManifest(
            tokenizer=TokenizerRecord("null", "tokenizer", "0" * 64, VOCAB_SIZE, 0),
            template={"generation": "0905"},
            splits=records,
            packing=PackingRecord(64, 1, "best-fit", "refuse"),
            source=SourceRecord("random", 1, 1, num_samples, {}, 0, content),
            plan_sha256=content,
        ),
    )
    return directory
