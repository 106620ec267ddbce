"""Rounds over a channel: two engines in threads, a sender that does as it should, and some not."""

import asyncio
import threading

import pytest
import torch
import torch.distributed as dist

from megatron_k2.engine.protocol import UpdateCode, UpdateError
from megatron_k2.engine.transfer.manifest import Counted
from megatron_k2.weight_sync import broadcast
from megatron_k2.weight_sync.broadcast import receive_round, send_round
from megatron_k2.weight_sync.channel import Channel
from tests.weight_sync.far_side import BUCKET_BYTES, new_engine, send, tensors_of


class Crowd:
    """A sender's channel, and engines that take ``num_rounds`` rounds from it."""

    def __init__(self, num_rounds, num_engines=2):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.engines = [new_engine() for _ in range(num_engines)]
        self.threads = [
            threading.Thread(
                target=self.listen, args=(store.port, rank, num_rounds, engine), daemon=True
            )
            for rank, (engine, _) in enumerate(self.engines, start=1)
        ]
        for thread in self.threads:
            thread.start()
        self.channel = Channel(store, 0, 1 + num_engines, 60)

    def listen(self, port, rank, num_rounds, engine):
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        channel = Channel(store, rank, 1 + len(self.engines), 60)
        for _ in range(num_rounds):
            asyncio.run(receive_round(channel, engine))

    def served(self):
        """Of each engine: ready, the version, and whether it holds that version's bits."""
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        found = []
        for engine, weights in self.engines:
            ready, _, _, version, *_ = engine.health()
            expected = tensors_of(version) if ready else {}
            same = all(expected[n].equal(t) for n, t in weights.held.items()) if ready else None
            found.append((ready, version, same))
            asyncio.run(engine.close())
        return found


def test_every_engine_gets_every_round():
    crowd = Crowd(3)
    for version in ("old", "new", "old"):
        send(crowd.channel, version)
    assert crowd.served() == [(True, "old", True)] * 2


def refusal(channel, tensors, version="new"):
    with pytest.raises(UpdateError) as refused:
        send_round(channel, Counted(tensors, version), version, BUCKET_BYTES)
    return refused.value


def test_a_refused_round_is_told_and_the_next_mends_it():
    crowd = Crowd(3)
    send(crowd.channel, "old")
    strange = {"model.layers.7.mlp.odd": torch.zeros(2)} | tensors_of("new")
    error = refusal(crowd.channel, strange.items())
    assert error.code is UpdateCode.WEIGHTS
    assert "engine 1" in str(error)
    assert "'model.layers.7.mlp.odd' is no weight" in str(error)
    assert [engine.health().is_ready for engine, _ in crowd.engines] == [False] * 2
    send(crowd.channel, "new")
    assert crowd.served() == [(True, "new", True)] * 2


def test_a_sender_that_stops_says_so():
    def stopping():
        yield from list(tensors_of("new").items())[:9]
        raise ZeroDivisionError("no loss today")

    crowd = Crowd(2)
    with pytest.raises(ZeroDivisionError):
        send_round(crowd.channel, Counted(stopping(), "new"), "new", BUCKET_BYTES)
    assert "no loss today" in crowd.engines[0][0].health().detail
    send(crowd.channel, "new")
    assert crowd.served() == [(True, "new", True)] * 2


@pytest.mark.parametrize(
    ("fault", "code"),
    [("lost", UpdateCode.DELIVERY), ("again", UpdateCode.DELIVERY), ("old", UpdateCode.VERSION)],
)
def test_a_bucket_that_is_not_the_next_one_ends_the_round(monkeypatch, fault, code):
    right = broadcast._send_bucket

    def wrong(channel, version, index, bucket):
        if index == 3 and fault == "lost":
            return
        right(channel, "old" if index == 3 and fault == "old" else version, index, bucket)
        if index == 3 and fault == "again":
            right(channel, version, index, bucket)

    crowd = Crowd(2)
    monkeypatch.setattr(broadcast, "_send_bucket", wrong)
    assert refusal(crowd.channel, tensors_of("new").items()).code is code
    monkeypatch.undo()
    send(crowd.channel, "new")
    assert crowd.served() == [(True, "new", True)] * 2


def test_buckets_of_a_swapped_tensor_are_found_by_what_the_engine_holds(monkeypatch):
    """Equal shapes exchanged under way: every header is right, and only the bits tell."""
    right = broadcast._send_bucket

    def wrong(channel, version, index, bucket):
        names = [name for name, _ in bucket]
        ends = ("0.gate_proj.weight", "0.up_proj.weight")
        pairs = [i for i, name in enumerate(names) if name.endswith(ends)]
        if len(pairs) == 2:
            a, b = pairs
            bucket[a], bucket[b] = (names[a], bucket[b][1]), (names[b], bucket[a][1])
        right(channel, version, index, bucket)

    crowd = Crowd(1, num_engines=1)
    monkeypatch.setattr(broadcast, "_send_bucket", wrong)
    error = refusal(crowd.channel, tensors_of("new").items())
    assert error.code is UpdateCode.CHECKSUM
    assert not crowd.served()[0][0]
