"""Hugging Face tokenizers, and a byte-level BPE trained on the spot.

A ``tokenizer.json`` is read with the ``tokenizers`` library, which imports in milliseconds;
``transformers`` is imported only for a directory that has no such file.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_k2.data.special_tokens import special_token
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""What belongs to a tokenizer in a model's directory; the rest (weights, config) does not."""

END_OF_DOCUMENT_NAMES = ("<|eod|>", "<|endoftext|>", "<|end_of_text|>", "[EOS]", "<eos>", "</s>")
"""Tried in this order where no file names an ``eos_token``."""

BPE_BOS, BPE_EOD = "<|bos|>", "<|eod|>"
BPE_CONTROL_TOKENS = (
    *(BPE_BOS, BPE_EOD, "[PAD]"),
    *("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *(f"<|reserved_token_{number}|>" for number in (13, 14, 15)),
)
"""Ids 0 to 15 of a vocabulary trained here: K2's chat format at toy size, from pretraining on."""
MIN_BPE_VOCABULARY = 256 + len(BPE_CONTROL_TOKENS)


def _tokenizer_files(directory: Path) -> list[Path]:
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


class TokenizerJson:
    """A Hugging Face fast tokenizer: ``tokenizer.json``, with ``tokenizer_config.json`` if there.

    Names of special tokens in text stay letters, as for K2's. (Added tokens that are *not* marked
    special are matched: they are part of the vocabulary's ordinary text.)

    Args:
        directory: Where ``tokenizer.json`` lies.
    """

    kind = "tokenizer.json"

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        self._files = _tokenizer_files(directory)
        path = directory / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have holes, so the count of entries is not the number of rows needed.
        self.vocab_size: int = max(ids.values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {token.content: i for i, token in added.items()}
        bos, eos = (special_token(directory, name) for name in ("bos_token", "eos_token"))
        self.bos_id: int | None = ids.get(bos) if bos else None
        candidates = [eos] if eos else END_OF_DOCUMENT_NAMES
        name = next((c for c in candidates if c in ids), None)
        if name is None:
            raise UserError(
                f"{directory}: no end-of-document token: none of {', '.join(candidates)} is in the "
                "vocabulary; name one as eos_token in tokenizer_config.json"
            )
        self.eod_id: int = ids[name]
        self.identity = sha256_of_files(self._files)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as plain text, with no BOS or EOD added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens by name."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id, control tokens by their names, nothing for holes.

        Raises:
            UserError: the vocabulary is not a byte-level one.
        """
        letters, special = _byte_letters(), set(self.special_ids.values())
        found = []
        for number in range(self.vocab_size):
            text = self._tokenizer.id_to_token(number) or ""
            if number in special:
                found.append(text.encode())
            elif all(letter in letters for letter in text):
                found.append(bytes(letters[letter] for letter in text))
            else:
                raise UserError(f"token {number}, {text!r}, is not of a byte-level vocabulary")
        return found

    def save(self, directory: Path) -> None:
        """Copy the tokenizer's files; ``AutoTokenizer`` reads the copy.

        A lone ``tokenizer.json`` gets the ``tokenizer_config.json`` that AutoTokenizer asks for.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for path in self._files:
            shutil.copyfile(path, directory / path.name)
        if not (directory / "tokenizer_config.json").exists():
            eos = self._tokenizer.id_to_token(self.eod_id)
            _write_fast_config(directory, {"eos_token": eos})


class TransformersTokenizer:
    """A directory without ``tokenizer.json`` (SentencePiece, ``vocab.json`` with ``merges.txt``).

    Args:
        directory: A local directory; nothing is downloaded and no code in it is run.
    """

    kind = "transformers"

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._files = _tokenizer_files(directory)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # of a damaged file it raises whatever comes
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"{directory}: transformers cannot read a tokenizer: {reason}"
            ) from None
        ids = self._tokenizer.get_vocab()
        eos = special_token(directory, "eos_token")
        if eos not in ids:
            raise UserError(
                f"{directory}: eos_token {eos!r} is not in the vocabulary; name one that is in "
                "tokenizer_config.json"
            )
        self.vocab_size: int = max(ids.values()) + 1
        self.special_ids: dict[str, int] = dict(self._tokenizer.get_added_vocab())
        self.eod_id: int = ids[eos]
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.identity = sha256_of_files(self._files)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as plain text, with no BOS or EOD added."""
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens by name."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """Not told.

        Raises:
            UserError: always.
        """
        raise UserError(
            "the bytes of this tokenizer's tokens are not known; expected tiktoken.model or a "
            "byte-level tokenizer.json"
        )

    def save(self, directory: Path) -> None:
        """Copy the files that the tokenizer was read from into ``directory``."""
        directory.mkdir(parents=True, exist_ok=True)
        for path in self._files:
            shutil.copyfile(path, directory / path.name)


def _byte_letters() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte: itself where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in seen)
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(others)}


def _write_fast_config(directory: Path, fields: dict[str, Any]) -> None:
    config = {
        **fields,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_byte_bpe(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE and write its Hugging Face files.

    All 256 bytes are in the alphabet, so any text round-trips. ``<|bos|>`` is id 0, ``<|eod|>`` id
    1, and K2's control tokens follow (``BPE_CONTROL_TOKENS``), each with a row to learn. Training
    is deterministic: the same texts give the same files.

    Args:
        texts: Training documents. Only the training split: a vocabulary fitted to validation text
            would flatter the validation loss.
        vocab_size: Entries in total. A small corpus may support fewer merges than that.
        directory: Where ``tokenizer.json`` and ``tokenizer_config.json`` go.

    Raises:
        UserError: if ``vocab_size`` does not hold the bytes and the control tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_bpe_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(BPE_CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_fast_config(directory, {"bos_token": BPE_BOS, "eos_token": BPE_EOD})


def check_bpe_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary too small for the bytes and the control tokens."""
    if vocab_size < MIN_BPE_VOCABULARY:
        raise UserError(
            f"--train-bpe {vocab_size}: a byte-level vocabulary needs at least "
            f"{MIN_BPE_VOCABULARY} entries (256 bytes, {len(BPE_CONTROL_TOKENS)} control tokens)"
        )
