"""States of Megatron's activation offload, written out: what a repair and a patch are shown on."""

from types import SimpleNamespace

import torch


def between_two_layers():
    """One of the chunk's two groups came and went; nothing is pending, one is to come."""
    groups = [SimpleNamespace(_name="moe_act"), SimpleNamespace(_name="moe_act")]
    return SimpleNamespace(
        offload_groups=groups,
        _offloaded_group_index=1,
        _groups_to_reload=[],
        _groups_to_offload=[],
        _max_group_size=2,
        find_group_with_name=lambda groups, name, start=0: next(
            (group for group in groups[start:] if group._name == name), None
        ),
    )


def on_the_host(events):
    """A handler, and the tag of a tensor of its that left the device; ``events`` says who acts."""
    tag, value = (1, 0), torch.ones(2)
    group = SimpleNamespace(
        _tensors={tag: ("cuda", value)},
        pop_tensor=lambda tag: ("cuda", value),
        wait_offload_event=lambda _stream: events.append("wait"),
    )
    handler = SimpleNamespace(
        offload_groups=[group], reload=lambda state: events.append("reload") or state[1]
    )
    return handler, tag
