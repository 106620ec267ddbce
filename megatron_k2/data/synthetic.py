"""Small corpora, one a domain, for runs whose data does not matter: CPU twins and tests.

Each domain has token ids of its own, so that a batch shows which domains it was drawn from, and a
rule of its own from one token to the next, so that a model can learn it. The same bytes on every
machine.
"""

import os
import zlib
from pathlib import Path

import numpy as np

from megatron_k2.data.indexed import bin_path, idx_path, token_dtype, write_indexed
from megatron_k2.errors import UserError
from megatron_k2.files import commit_file

DOMAINS = ("web", "code", "mathematics", "knowledge", "long", "train")
NUM_TOKENS = 2**16
"""Of each domain."""
DOCUMENT_TOKENS = {"long": 4096}
"""End of document included."""
SHORT_DOCUMENT_TOKENS = 256
PREDICTABLE = 0.9
"""Part of the tokens that follow from the one before."""


def domain_ids(domain: str, vocab_size: int) -> range:
    """The token ids of ``domain``; the first of all slots is for ids that have a meaning.

    Raises:
        UserError: if there is no such domain.
    """
    if domain not in DOMAINS:
        raise UserError(
            f"--synthetic-data: '{domain}' is not a domain; a prefix ends in one of "
            f"{', '.join(DOMAINS)}"
        )
    width = vocab_size // (len(DOMAINS) + 1)
    start = (DOMAINS.index(domain) + 1) * width
    return range(start, start + width)


def write_domain(prefix: Path, vocab_size: int, eod_id: int) -> None:
    """Make the corpus of the domain that ``prefix`` ends in, unless it is there.

    Raises:
        UserError: if it ends in none.
    """
    ids = domain_ids(prefix.name, vocab_size)
    if idx_path(prefix).is_file():  # written last
        return
    length = DOCUMENT_TOKENS.get(prefix.name, SHORT_DOCUMENT_TOKENS)
    num_documents = NUM_TOKENS // length
    rng = np.random.default_rng(zlib.crc32(prefix.name.encode()))
    successor = rng.permutation(len(ids))
    tokens = np.empty((num_documents, length), dtype=token_dtype(vocab_size))
    now = rng.integers(len(ids), size=num_documents)
    for position in range(length - 1):
        tokens[:, position] = ids.start + now
        is_predictable = rng.random(num_documents) < PREDICTABLE
        now = np.where(is_predictable, successor[now], rng.integers(len(ids), size=num_documents))
    tokens[:, -1] = eod_id
    prefix.parent.mkdir(parents=True, exist_ok=True)
    own = prefix.with_name(f".{prefix.name}.{os.getpid()}")  # another run may be at it, too
    write_indexed(own, tokens, tokens.dtype)
    commit_file(bin_path(own), bin_path(prefix))
    commit_file(idx_path(own), idx_path(prefix))
