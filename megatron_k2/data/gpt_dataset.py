"""Megatron's ``GPTDataset``, whose stored sample index is found by what the dataset holds.

Megatron names the index by a hash over the prefix as it was typed, and takes what it finds under
that name: of a corpus prepared anew in the same place it would read the old one's index, and draw
fewer documents than there are, or run beyond their end. Here the content is in the name too. The
index of a blend is named by its datasets' descriptions, and follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_k2.data.content import content_hash


@dataclass
class ContentConfig(GPTDatasetConfig):
    """Megatron's, and what each prefix holds."""

    contents: dict[str, str | None] = field(default_factory=dict)
    """Prefix -> ``content_hash``; ``None`` on a remote store, where the path alone counts."""


class ContentDataset(GPTDataset):
    """``GPTDataset`` whose description, the key of its stored index, names the content."""

    def __init__(self, dataset: Any, dataset_path: str, *rest: Any) -> None:
        config: ContentConfig = rest[-1]
        content = config.contents.get(dataset_path)
        described = dataset_path if content is None else f"{dataset_path} sha256 {content}"
        super().__init__(dataset, described, *rest)


def contents_of(prefixes: Sequence[str]) -> dict[str, str | None]:
    """Prefix -> content, as rank 0 sees it; a collective call where there are ranks."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    found = [{prefix: content_hash(prefix) for prefix in prefixes} if is_first else {}]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]
