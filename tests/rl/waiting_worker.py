"""One rank that waits for rank 0: ``python -m tests.rl.waiting_worker JSON``.

The file is ``{"work": "long" | "short" | "fails" | "refuses", "asked": rank or null,
"stops": rank or null}``; what came of it is the last line that the rank prints. The one that stops
sends itself SIGSTOP before its second wait.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_k2.errors import UserError
from megatron_k2.rl.waiting import EXIT_CODE, EndAsked, LostError, Waiting, end_within

BEAT_SECONDS, SILENT_SECONDS = 0.1, 2.0


async def work(kind):
    print("works", flush=True)
    if kind == "fails":
        raise RuntimeError("the controller has gone")
    if kind == "refuses":
        raise UserError("--tasks none: no such file")
    try:
        await asyncio.sleep(3600 if kind == "long" else 0.3)
    except asyncio.CancelledError:
        print("work was cancelled", flush=True)
        raise
    return "groups"


async def wait(case):
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    waiting = Waiting(
        store,
        rank,
        dist.get_world_size(),
        must_end=lambda: case["asked"] == rank,
        beat_seconds=BEAT_SECONDS,
        silent_seconds=SILENT_SECONDS,
    )
    print("waits", flush=True)
    for number in range(1 if case["work"] == "long" else 2):
        if number and case["stops"] == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        found = await waiting.through("rollouts", work(case["work"]) if rank == 0 else None)
    box = [found]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def main():
    case = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    try:
        print("found", asyncio.run(wait(case)))
    except LostError as error:
        end_within()
        print("lost:", error, flush=True)
        sys.exit(EXIT_CODE)
    except (UserError, RuntimeError, EndAsked) as error:
        end_within()
        print(f"{type(error).__name__}:", error, flush=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
