"""Token masks of llguidance and xgrammar: start-up, a schema's compilation, each token's mask.

Two vocabularies: a byte-level BPE of 4,096 trained on this repository's documents (k2-tiny's size),
and K2's own, or 163,840 random strings. One schema with strings, enums, an array and an object is
walked by uniform draws among the allowed tokens. A library that is not installed is left out.

    python benchmarks/token_masks.py [--tokenizer PATH] [--answers 20] [--seed 0]
"""

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from harness import machine_lock, print_inputs, print_result

from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.data.tokenizer import load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 4},
        "who": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["city", "unit", "days", "who"],
    "additionalProperties": False,
}


class Walk(Protocol):
    """An answer under way."""

    def mask(self) -> np.ndarray:
        """Bits of the allowed tokens, int32 words."""

    def accept(self, token: int) -> None:
        """This one came."""


class WithLlguidance:
    """See the module."""

    def __init__(self, tokens: list[bytes], end: int) -> None:
        import llguidance

        class Described:
            eos_token_id, bos_token_id, special_token_ids = end, None, [end]

            def __init__(self) -> None:
                self.tokens = tokens

            def __call__(self, text: bytes | str) -> list[int]:
                """Byte by byte: what is forced is told so."""
                given = text.encode() if isinstance(text, str) else text
                return [places[bytes([byte])] for byte in given]

        places = {token: number for number, token in enumerate(tokens)}
        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Described()))
        self._words = np.zeros((1, (len(tokens) + 31) // 32), np.int32)

    def compiled(self) -> Callable[[], Walk]:
        schema = SCHEMA | {"x-guidance": {"whitespace_flexible": False}}
        grammar = self._library.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        first = self._library.LLMatcher(self._tokenizer, grammar)
        words = self._words

        class Of:
            def __init__(self) -> None:
                self._matcher = first.deep_copy()
                self.accept = self._matcher.consume_token

            def mask(self) -> np.ndarray:
                self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                return words

        return Of


class WithXgrammar:
    """See the module."""

    def __init__(self, tokens: list[bytes], end: int) -> None:
        import xgrammar

        kind = xgrammar.VocabType.RAW
        info = xgrammar.TokenizerInfo(tokens, kind, stop_token_ids=[end])
        self._library, self._compiler = xgrammar, xgrammar.GrammarCompiler(info, max_threads=1)
        self._mask = xgrammar.allocate_token_bitmask(1, len(tokens))

    def compiled(self) -> Callable[[], Walk]:
        found = self._compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
        library, mask = self._library, self._mask

        class Of:
            def __init__(self) -> None:
                self._matcher = library.GrammarMatcher(found)
                self.accept = self._matcher.accept_token

            def mask(self) -> np.ndarray:
                self._matcher.fill_next_token_bitmask(mask)
                return mask.numpy()

        return Of


LIBRARIES = {"llguidance": WithLlguidance, "xgrammar": WithXgrammar}


def trained(size: int) -> list[bytes]:
    """Tokens of a BPE of this repository's documents."""
    folder = Path(__file__).parent.parent
    texts = [
        p.read_text(encoding="utf-8") for p in [*folder.glob("docs/*.md"), *folder.glob("*.md")]
    ]
    with tempfile.TemporaryDirectory() as target:
        train_byte_bpe(texts, size, Path(target))
        return load_tokenizer(target).token_bytes()


def random_tokens(size: int, seed: int) -> list[bytes]:
    """All bytes, then distinct strings of letters and marks of JSON."""
    draw, letters = random.Random(seed), 'abcdefghijklmnopqrstuvwxyz ABCDE0123456789"{}[]:,.-_'
    found = dict.fromkeys([b"<end>", *(bytes([i]) for i in range(256))])
    while len(found) < size:
        found["".join(draw.choices(letters, k=draw.randint(2, 8))).encode()] = None
    return list(found)


def walked(make: Callable[[], Walk], end: int, size: int, answers: int, seed: int) -> list[float]:
    """Seconds of each mask of some answers."""
    draw, seconds = random.Random(seed), []
    for _ in range(answers):
        walk, token = make(), -1
        while token != end:
            begin = time.perf_counter()
            words = walk.mask()
            seconds.append(time.perf_counter() - begin)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:size]
            token = int(draw.choice(np.flatnonzero(bits)))
            walk.accept(token)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="K2's; random strings without")
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = {}
    with machine_lock():
        print_inputs(**vars(options))
        small = trained(4096)
        large = (random_tokens(163_840, options.seed), 0)
        if options.tokenizer:
            tokenizer = load_tokenizer(options.tokenizer)
            large = (tokenizer.token_bytes(), tokenizer.special_ids["<|im_end|>"])
        vocabularies = {"4k": (small, 3), "160k": large}
        for library, of in LIBRARIES.items():
            if importlib.util.find_spec(library) is None:
                print(f"{library}: not installed")
                continue
            begin = time.perf_counter()
            __import__(library)
            print(f"{library}: imported in {time.perf_counter() - begin:.2f} s")
            for name, (tokens, end) in vocabularies.items():
                times = [time.perf_counter()]
                made = of(tokens, end)
                times.append(time.perf_counter())
                make = made.compiled()
                times.append(time.perf_counter())
                masks = walked(make, end, len(tokens), options.answers, options.seed)
                median, worst = 1e6 * float(np.median(masks)), 1e6 * max(masks)
                mean = results[f"{library}_{name}_mask_us"] = 1e6 * float(np.mean(masks))
                print(
                    f"{library}, {len(tokens):,} tokens: vocabulary {times[1] - times[0]:.2f} s, "
                    f"schema {1e3 * (times[2] - times[1]):.1f} ms, mask {mean:.0f} us (median "
                    f"{median:.0f}, most {worst:.0f}, {len(masks)} of them)",
                    flush=True,
                )
        print_result(**results)


if __name__ == "__main__":
    main()
