"""Repairs of Megatron's activation offload, each beside the upstream it repairs.

A handler's state is written out; whole runs are ``tests/te/test_overlapped.py``. What cannot be
seen without a GPU is the stale copy itself: here it is who waits for whom.
"""

import pytest
import torch
from megatron.core.pipeline_parallel import fine_grained_activation_offload as room

from megatron_k2.errors import UserError
from megatron_k2.host import offload_repairs
from tests.support.offload_states import between_two_layers, on_the_host

NAMES = ("finish_all_groups", "tensor_pop")


@pytest.fixture
def original(monkeypatch):
    """As released, and so again afterwards."""
    for name in NAMES:
        monkeypatch.setattr(room.ChunkOffloadHandler, name, vars(room.ChunkOffloadHandler)[name])


@pytest.mark.usefixtures("original")
def test_upstream_still_leaves_a_chunk_whose_groups_are_to_come():
    """If this fails, upstream has been repaired: drop ``end_offload_chunk_with_its_groups``."""
    chunk = between_two_layers()
    assert room.ChunkOffloadHandler.finish_all_groups(chunk, "moe_act")
    offload_repairs.end_offload_chunk_with_its_groups()
    assert not room.ChunkOffloadHandler.finish_all_groups(chunk, "moe_act")
    chunk._offloaded_group_index = 2
    assert room.ChunkOffloadHandler.finish_all_groups(chunk, "moe_act")


@pytest.mark.usefixtures("original")
def test_upstream_still_reloads_without_waiting_for_the_copy_it_reads(monkeypatch):
    """If this fails, upstream has been repaired: drop ``reload_after_offload``."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    events = []
    handler, tag = on_the_host(events)
    room.ChunkOffloadHandler.tensor_pop(handler, tag)
    assert events == ["reload"]
    events.clear()
    offload_repairs.reload_after_offload()
    offload_repairs.reload_after_offload()
    room.ChunkOffloadHandler.tensor_pop(handler, tag)
    assert events == ["wait", "reload"]
    events.clear()
    handler.offload_groups[0]._tensors[tag] = torch.ones(2)  # never left the device
    handler.offload_groups[0].pop_tensor = lambda tag: torch.ones(2)
    room.ChunkOffloadHandler.tensor_pop(handler, tag)
    assert events == []


@pytest.mark.parametrize(
    "repair",
    [offload_repairs.end_offload_chunk_with_its_groups, offload_repairs.reload_after_offload],
)
def test_a_version_that_was_not_checked_is_refused(monkeypatch, repair):
    monkeypatch.setattr("megatron_k2.host.repairs.installed_version", lambda _name: "0.20.0")
    with pytest.raises(UserError, match=r"0\.20\.0"):
        repair()
