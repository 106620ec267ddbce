"""Worker processes that tokenize parts.

Spawned, not forked: the parent may have loaded torch and its threads. A worker imports neither
torch nor Megatron, and hands its work over as a file, so nothing big crosses a pipe.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

from megatron_k2.data.parts import Part
from megatron_k2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_k2.errors import UserError


@functools.lru_cache(maxsize=1)
def worker_tokenizer(directory: Path, identity: str) -> Tokenizer:
    """Each process reads the tokenizer once; by identity, for a path may get other contents."""
    tokenizer = load_tokenizer(directory)
    assert tokenizer.identity == identity
    return tokenizer


def _exit_with_parent() -> None:
    """Watch the parent: a worker also holds its pipe's other end, so it sees no end of file."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the parent alone decides, and workers finish their part.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core already; the tokenizers library would start a thread a core in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def work_on_parts(
    parts: Sequence[Part], work: Callable[[Part], int], num_workers: int
) -> Iterator[int]:
    """Do ``work`` for each part, in any order; one worker means this process.

    Args:
        parts: What to work on.
        work: Leaves a part's file and returns its input bytes; a function that can be pickled.
        num_workers: Processes.

    Yields:
        Input bytes of each part as it is done.

    Raises:
        UserError: a document cannot be read, or a worker died.
    """
    if num_workers == 1 or len(parts) <= 1:
        for part in parts:
            yield work(part)
        return
    pool = ProcessPoolExecutor(
        min(num_workers, len(parts)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        for future in as_completed([pool.submit(work, part) for part in parts]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for want of memory; finished parts are kept, so run "
            f"the same command again with fewer --workers than {num_workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
