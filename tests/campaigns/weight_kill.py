"""A sender, or an engine, killed before every message of a round: is a mixture ever served?

    python tests/campaigns/weight_kill.py            # every message, both sides: a few minutes

The side under test is a process of its own that takes part in a whole round, ``old``, and gets
SIGKILL in the next, ``new``. What is left must be the old weights, the new ones, whole and tagged
so, or a refusal; a sender that outlives its engine must be told so. Afterwards a whole round must
mend an engine. Not exercised: a kill of the machine, gloo between machines.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_k2.engine.protocol import EngineError, Request, SamplingParams, UpdateError
from megatron_k2.engine.transfer.buckets import buckets_of
from megatron_k2.engine.transfer.manifest import Counted
from megatron_k2.weight_sync.broadcast import receive_round
from megatron_k2.weight_sync.channel import Channel
from tests.support.distributed import end, start_ranks
from tests.weight_sync.far_side import BUCKET_BYTES, VERSIONS, new_engine, send, tensors_of


def num_messages():
    """Of one round: length, header and bytes of each bucket; two of the end; the answers."""
    return 3 * len(list(buckets_of(tensors_of("new").items(), BUCKET_BYTES))) + 3


async def held_by(engine, weights):
    """What an engine serves: a version whose bits it holds, ``refused``, or ``mixture``."""
    try:
        request = Request("r", (1, 2), SamplingParams(max_tokens=1))
        async for _ in engine.generate(request):
            pass
    except EngineError:
        return "refused"
    version = engine.health().weight_version
    expected = tensors_of(version) if version in VERSIONS else {}
    same = all(expected[name].equal(place) for name, place in weights.held.items())
    return version if same else "mixture"


async def against_a_dying_sender(channel):
    """What the engine serves afterwards, and whether a whole round mends it."""
    engine, weights = new_engine()
    await receive_round(channel, engine)
    try:
        await receive_round(channel, engine)
    except UpdateError:
        pass
    found = await held_by(engine, weights)
    counted = Counted(tensors_of("new").items(), "new")
    await engine.update_weights(counted, "new", counted.manifest)
    mended = await held_by(engine, weights)
    await engine.close()
    return found if mended == "new" else f"{found}, not mended: {mended}"


def against_a_dying_engine(channel):
    """What the sender is told."""
    send(channel, "old")
    try:
        send(channel, "new")
    except UpdateError as error:
        return f"told: {error.code}"
    return "told nothing"


def kill_at(role, message, folder):
    """Kill one side before a message; what became of the other."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    case = json.dumps({"role": role, "port": store.port, "kill_at": message})
    (far,) = start_ranks("tests.weight_sync.far_side", 1, [case], folder / f"{role}{message}")
    try:
        channel = Channel(store, 1 if role == "sender" else 0, 2, 60.0)
        if role == "sender":
            return asyncio.run(against_a_dying_sender(channel))
        return against_a_dying_engine(channel)
    finally:
        end(far)


def is_right(role, found):
    return found in ({"old", "new", "refused"} if role == "sender" else {"told: engine"})


def main(argv=None):
    """Run the campaign; exit code 1 if anything but whole weights or a refusal was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="*", help="messages; default: every one")
    options = parser.parse_args(argv)
    num_wrong = 0
    with tempfile.TemporaryDirectory() as name:
        for role in ("sender", "engine"):
            messages = range(num_messages()) if options.only is None else options.only
            counts = Counter(kill_at(role, message, Path(name)) for message in messages)
            print(f"{role} killed before each of {len(messages)} messages: {dict(counts)}")
            num_wrong += sum(count for found, count in counts.items() if not is_right(role, found))
    print(f"{num_wrong} wrong")
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
