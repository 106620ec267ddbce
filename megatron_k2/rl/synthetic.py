"""Task sets and a tokenizer made on the spot, for recipes' twins: nothing has to be at hand.

A task asks for one letter a number of times. Weights that never learnt anything pass about half of
them by chance, so that a group's answers differ in reward from the first iteration on, and they
pass more once they prefer words with that letter.
"""

import json
import os
import shutil
from pathlib import Path

from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.files import write_atomically
from megatron_k2.flags.words import last_value
from megatron_k2.gym.instructions.constraints import asks
from megatron_k2.gym.instructions.env import NAME
from megatron_k2.gym.protocol import Task
from megatron_k2.run.flags import RunFlags

LETTERS, NUMBERS = "taoinsr", (6, 8, 10, 12)
MAX_TOKENS = 32
"""Of an answer. Drawn evenly, as many tokens have each of the letters 8 to 11 times on average."""
NUM_HELD_OUT = 8
TOKENIZER_FILE = "tokenizer.json"


def prepare(flags: RunFlags) -> None:
    """What ``--synthetic-data`` asks for, unless it is there; several processes may be at it.

    Args:
        flags: of the run, expanded.
    """
    tasks, tokenizer = (last_value(flags.words, name) for name in ("--tasks", "--chat-tokenizer"))
    if "--synthetic-data" in flags and tasks and tokenizer and flags.vocab_size is not None:
        write_letter_tasks(Path(tasks))
        write_tokenizer(Path(tokenizer), flags.vocab_size)


def letter_tasks() -> list[Task]:
    """Each letter with each number, on no topic."""
    found = []
    for letter in LETTERS:
        for number in NUMBERS:
            arguments = {"letter": letter, "number": number}
            reference = {"constraints": [{"kind": "least_letter", **arguments}], "topic": []}
            found.append(Task(NAME, asks("least_letter", arguments), reference))
    return found


def write_letter_tasks(path: Path) -> None:
    """Write a file of one task set, and its tasks beside it, unless it is there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = path.with_suffix(".jsonl")
    lines = "".join(json.dumps(task.as_json()) + "\n" for task in letter_tasks())
    row = {"name": "letters", "tasks": tasks.name, "max_tokens": MAX_TOKENS, "penalty": 0}
    row |= {"held_out": NUM_HELD_OUT}
    write_atomically(tasks, lines.encode())
    write_atomically(path, (json.dumps({"task_sets": [row]}, indent=1) + "\n").encode())


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE with K2's control tokens, of this package's own text, unless one is there.

    Args:
        directory: of the tokenizer.
        vocab_size: ids of the model, each of which then is a piece of text.

    Raises:
        UserError: see ``train_byte_bpe``.
    """
    if (directory / TOKENIZER_FILE).exists():
        return
    own = directory.with_name(f".{directory.name}.{os.getpid()}")  # another run may be at it, too
    texts = (path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    train_byte_bpe(texts, vocab_size, own)
    try:
        own.rename(directory)
    except OSError:  # it was faster, or something else lies there, which the reader will name
        shutil.rmtree(own)
