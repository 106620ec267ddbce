"""Kimi K2's own tokenizer: a tiktoken vocabulary file and a pre-token pattern.

K2 ships ``tiktoken.model`` (163,584 byte-pair ranks) and ``tokenizer_config.json``; ids from
163,584 on are 256 control tokens, which fills the model's 163,840 embedding rows. The released code
names two control tokens more (256 + 2); their ids lie beyond the embedding and are left out here.

Two departures from the released ``encode``:

* It lets a literal ``<|im_end|>`` in text become the control token. Text from the web must not end
  a turn, so ``encode`` here is always the ordinary one; control tokens are placed by id
  (``special_ids``), by whoever builds the chat format.
* Nothing is decoded from the surplus ids: they raise.
"""

import base64
import binascii
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_files

VOCABULARY_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
NUM_SPECIAL_TOKENS = 256
"""Control tokens that have an embedding row; the released code counts 256 + 2."""

MAX_ENCODE_CHARS = 400_000
"""tiktoken's regex engine overflows its stack beyond this (openai/tiktoken#195)."""
MAX_RUN_CHARS = 25_000
"""Longest run of only whitespace, or of none, handed over in one call; BPE is quadratic in it."""

# Classes with ``&&`` (intersection) are Rust regex syntax; Python's ``re`` does not read them.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PRE_TOKEN_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Order matters: the first alternative that matches wins."""

# ``\s`` on str is ``str.isspace``, the test the released loop makes character by character.
_LONG_RUN = re.compile(rf"\s{{{MAX_RUN_CHARS + 1},}}|\S{{{MAX_RUN_CHARS + 1},}}")


def split_long_text(text: str) -> Iterator[str]:
    """Cut where the released code cuts: every 400,000 characters, and inside over-long runs.

    The run counter restarts at each 400,000-character piece, as it does there.

    Yields:
        Pieces that concatenate to ``text``; none for an empty text.
    """
    for start in range(0, len(text), MAX_ENCODE_CHARS):
        piece = text[start : start + MAX_ENCODE_CHARS]
        cuts = [
            cut
            for run in _LONG_RUN.finditer(piece)
            for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS)
        ]
        for begin, end in zip([0, *cuts], [*cuts, len(piece)], strict=True):
            yield piece[begin:end]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Byte-pair ranks of a tiktoken file: one ``base64 rank`` a line.

    tiktoken's own loader is avoided: it caches by path in the temporary directory, and would
    answer for a file that has changed since with the old one.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}:{number}: not a 'base64 rank' line; expected a tiktoken vocabulary file "
                "such as Kimi K2's tiktoken.model"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise UserError(f"{path}: the {len(ranks)} ranks are not 0..n-1; the file is damaged")
    return ranks


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_bytes())
        missing = {"added_tokens_decoder", "bos_token", "eos_token"} - config.keys()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object ({error})") from None
    if missing:
        raise UserError(f"{path}: no {', '.join(sorted(missing))}; expected Kimi K2's file")
    return config


def _special_ids(config: dict, first_id: int, path: Path) -> dict[str, int]:
    """Name to id of all 256 control tokens; ids the config does not name are 'reserved'."""
    named = {int(i): entry["content"] for i, entry in config["added_tokens_decoder"].items()}
    outside = [i for i in named if not first_id <= i < first_id + NUM_SPECIAL_TOKENS]
    if outside:
        raise UserError(
            f"{path}: added token id {outside[0]} lies outside {first_id}.."
            f"{first_id + NUM_SPECIAL_TOKENS - 1}, the ids after this vocabulary's {first_id} "
            f"ranks; {VOCABULARY_FILE} and {CONFIG_FILE} do not belong together"
        )
    ids = range(first_id, first_id + NUM_SPECIAL_TOKENS)
    return {named.get(i, f"<|reserved_token_{i}|>"): i for i in ids}


class TiktokenTokenizer:
    """Tokenizer over a directory with ``tiktoken.model`` and ``tokenizer_config.json``.

    Args:
        directory: Where the two files lie.
    """

    kind = "tiktoken"

    def __init__(self, directory: Path) -> None:
        import tiktoken

        self._files = [directory / VOCABULARY_FILE, directory / CONFIG_FILE]
        for path in self._files:
            if not path.is_file():
                raise UserError(f"{path} is missing; a K2 tokenizer needs {VOCABULARY_FILE} and "
                                f"{CONFIG_FILE} side by side")  # fmt: skip
        ranks = read_ranks(self._files[0])
        config = _read_config(self._files[1])
        self.special_ids = _special_ids(config, len(ranks), self._files[1])
        self.vocab_size = len(ranks) + NUM_SPECIAL_TOKENS
        self.eod_id: int = self.special_ids[config["eos_token"]]
        self.bos_id: int | None = self.special_ids[config["bos_token"]]
        self.identity = sha256_of_files(self._files)
        self._encoding = tiktoken.Encoding(
            name=f"k2-{self.identity[:12]}",
            pat_str=PRE_TOKEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_ids,
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as plain text: a literal control token's name stays letters."""
        ids: list[int] = []
        for piece in split_long_text(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(ids)

    def save(self, directory: Path) -> None:
        """Copy the two files.

        ``AutoTokenizer`` reads the copy only once ``tokenization_kimi.py`` from the model's own
        repository lies beside it (``auto_map``, trust_remote_code); that code is not shipped here.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for path in self._files:
            shutil.copyfile(path, directory / path.name)
