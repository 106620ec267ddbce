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
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_k2.data.special_tokens import (
    CONFIG_FILE,
    MAP_FILE,
    read_object,
    special_token,
    token_text,
)
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_files

VOCABULARY_FILE = "tiktoken.model"
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


def _special_ids(config: dict, first_id: int, path: Path) -> dict[str, int]:
    """Name to id of all 256 control tokens; ids the config does not name are 'reserved'."""
    decoder = config["added_tokens_decoder"]
    if not isinstance(decoder, dict):
        raise UserError(
            f"{path}: added_tokens_decoder is {type(decoder).__name__}; expected an object, id to "
            "token"
        )
    named: dict[int, str] = {}
    for number, entry in decoder.items():
        text = token_text(entry)
        if not number.isdecimal() or text is None:
            raise UserError(
                f"{path}: added_tokens_decoder has '{number}': {entry!r}; expected an id and a "
                "token, as a string or as an object with 'content'"
            )
        named[int(number)] = text
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
        config = read_object(self._files[1])
        eos, bos = (special_token(directory, name) for name in ("eos_token", "bos_token"))
        missing = [] if "added_tokens_decoder" in config else ["added_tokens_decoder"]
        missing += ["eos_token"] if eos is None else []
        if eos is None or missing:
            raise UserError(
                f"{self._files[1]}: no {', '.join(missing)}; expected Kimi K2's file "
                "(transformers 5 saves it without the ids of the control tokens)"
            )
        self.special_ids = _special_ids(config, len(ranks), self._files[1])
        self.vocab_size = len(ranks) + NUM_SPECIAL_TOKENS
        self.eod_id: int = self._id(directory, "eos_token", eos)
        self.bos_id: int | None = None if bos is None else self._id(directory, "bos_token", bos)
        if (directory / MAP_FILE).is_file():
            self._files.append(directory / MAP_FILE)
        self.identity = sha256_of_files(self._files)
        self._encoding = tiktoken.Encoding(
            name=f"k2-{self.identity[:12]}",
            pat_str=PRE_TOKEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_ids,
            explicit_n_vocab=self.vocab_size,
        )

    def _id(self, directory: Path, name: str, token: str) -> int:
        if token not in self.special_ids:
            names = [known for known in self.special_ids if "reserved" not in known]
            raise UserError(
                f"{directory}: {name} '{token}' is not among the control tokens of {CONFIG_FILE} "
                f"({', '.join(names[:8])}, …); name one of them"
            )
        return self.special_ids[token]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as plain text: a literal control token's name stays letters."""
        if len(text) <= MAX_RUN_CHARS:  # most texts, and none of them is cut
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for piece in split_long_text(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(ids)

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id, control tokens by their names."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(self.vocab_size)]

    def save(self, directory: Path) -> None:
        """Copy the files.

        ``AutoTokenizer`` reads the copy only once ``tokenization_kimi.py`` from the model's own
        repository lies beside it (``auto_map``, trust_remote_code); that code is not shipped here.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for path in self._files:
            shutil.copyfile(path, directory / path.name)
