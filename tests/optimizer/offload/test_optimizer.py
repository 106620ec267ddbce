"""Optimizer states on the host: the same step to the bit, and every byte where and when it is said.

The oracle is the run without offload. Bytes on the device are read off the tensors' own storages,
which are really emptied, on a CPU too. ``PinnedHostTensors`` runs here over the CPU host's
stand-ins for streams, so its order of calls is exercised and its overlap is not. Wrong variants: a
visit whose result does not go back, and one whose weights are written before the clip. Over ranks,
through checkpoints, and on NCCL with ``pytest -m gpu``: ``tests/parallel/test_reshard.py``,
``test_bf16_and_mtp.py``.
"""

import itertools

import pytest
import torch

from megatron_k2.optimizer.offload import optimizer as offloaded
from megatron_k2.optimizer.offload.choice import chosen_for_host
from megatron_k2.optimizer.offload.host_tensors import HostTensors, PinnedHostTensors
from megatron_k2.optimizer.offload.optimizer import OffloadedMuonClip
from megatron_k2.optimizer.sharded.optimizer import DistributedMuonClip
from megatron_k2.planning.cost.memory import optimizer_bytes, rank_parameters
from megatron_k2.planning.cost.traffic import host_traffic
from megatron_k2.planning.gpus import GPUS
from megatron_k2.planning.request import RunRequest
from tests.optimizer.sharded.test_memory import MODEL, built
from tests.support.devices import DEVICES
from tests.support.single_rank import one_rank

STEPS = 3
WINDOW = 20_000
"""Bytes of a visit: a few of this model's matrices."""


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


def run(fraction, monkeypatch, host_tensors=HostTensors):
    """(model, the optimizer over ZeRO, weights and states after ``STEPS`` equal steps)."""
    monkeypatch.setattr(offloaded, "host_tensors_for", lambda device: host_tensors(WINDOW))
    torch.manual_seed(5)
    offload = ["--muonclip-cpu-offload", "--optimizer-offload-fraction", str(fraction)]
    ddp, chain = built(True, *(offload if fraction else []))
    (part,) = [o for o in chain.chained_optimizers if isinstance(o, DistributedMuonClip)]
    generator = torch.Generator().manual_seed(6)
    for step in range(STEPS):
        for param in ddp.parameters():
            param.main_grad.copy_(torch.randn(param.shape, generator=generator))
        part._max_logits.running.fill_(90.0 + 20 * step)  # over the threshold from the second on
        chain.step()
    return ddp, part, snapshot(ddp, part)


def snapshot(ddp, part):
    """Every weight and state by its name, on the CPU."""
    values = {name: param.detach().cpu().clone() for name, param in ddp.named_parameters()}
    for name, param in ddp.named_parameters():
        main, _ = part._shard(param)
        for state, tensor in part._named_state(param, main):
            values[f"{state} {name}"] = tensor.cpu().clone()
    return values


def states(part):
    """Every state tensor by parameter, wherever its numbers are."""
    return {
        param: [t for _, t in DistributedMuonClip._named_state(part, param, part._shard(param)[0])]
        for param in part.model_param_group_index_map
    }


@pytest.fixture(scope="module")
def plain(_rank):
    with pytest.MonkeyPatch.context() as patch:
        return run(0, patch)[2]


@pytest.mark.parametrize("host_tensors", [HostTensors, PinnedHostTensors])
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_steps_are_bit_equal_and_bytes_are_where_the_fraction_says(
    plain, fraction, host_tensors, monkeypatch
):
    _, part, found = run(fraction, monkeypatch, host_tensors)
    assert found.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
    sizes = {param: sum(t.nbytes for t in tensors) for param, tensors in states(part).items()}
    total = sum(sizes.values())
    assert [part.state_bytes(param) for param in sizes] == list(sizes.values())
    on_device = sum(
        t.untyped_storage().nbytes() for tensors in states(part).values() for t in tensors
    )
    home = part.host_tensors
    assert total - on_device == home.bytes_on_host
    assert fraction * total <= home.bytes_on_host < fraction * total + max(sizes.values())
    assert home.bytes_on_device == 0
    # Each byte on the host goes out and back once a step, and went there once in the beginning.
    assert home.bytes_to_device == STEPS * home.bytes_on_host
    assert home.bytes_to_host == (STEPS + 1) * home.bytes_on_host
    # The planner's closed form is what a run keeps there at least, and less than a shard short.
    r = RunRequest(
        preset=MODEL,
        gpu=GPUS["h100"],
        world_size=1,
        seq_length=64,
        sequences_per_step=1,
        optimizer_offload=fraction,
    )
    parameters = rank_parameters(r, 0)
    assert optimizer_bytes(r, parameters) == total
    planned = host_traffic(r, 0, parameters).optimizer
    assert planned <= home.bytes_to_device / STEPS < planned + max(sizes.values())


def test_a_step_has_few_windows_and_adamws_states_on_the_device(plain, monkeypatch):
    _, part, _ = run(1.0, monkeypatch)
    adamw = sum(t.nbytes for t in part._adamw_states)
    waiting = sum(main.nbytes for param in part._clipped for main in part._masters(param))
    largest = max(t.nbytes for tensors in states(part).values() for t in tensors)
    window = max(WINDOW, largest)
    home = part.host_tensors
    assert home.most_on_device <= adamw + waiting + 3 * window < home.bytes_on_host


class NotSentBack(HostTensors):
    """Wrong: what a visit changed is dropped."""

    def _copy_out(self, tensor, host):
        if not hasattr(self, "_seen"):
            self._seen = set()
        if tensor not in self._seen:
            super()._copy_out(tensor, host)
        self._seen.add(tensor)


def test_a_visit_that_is_not_sent_back_is_seen(plain, monkeypatch):
    _, _, found = run(1.0, monkeypatch, NotSentBack)
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


def test_weights_written_before_the_clip_are_seen(plain, monkeypatch):
    def without_clip(self, max_logits):
        DistributedMuonClip._qk_clip(self, max_logits)

    monkeypatch.setattr(OffloadedMuonClip, "_qk_clip", without_clip)
    _, _, found = run(1.0, monkeypatch)
    differing = [name for name in plain if not torch.equal(found[name], plain[name])]
    assert differing
    assert all("_up_proj" in name for name in differing)


def test_weights_loaded_alone_reach_the_masters_on_the_host(monkeypatch):
    ddp, part, _ = run(1.0, monkeypatch)
    for param in ddp.parameters():
        param.data.fill_(0.5)
    part.reload_model_params()
    masters = [t for name, t in snapshot(ddp, part).items() if name.startswith("fp32_param ")]
    assert masters
    assert all(torch.equal(master, torch.full_like(master, 0.5)) for master in masters)
    assert part.host_tensors.bytes_on_device == 0


def test_the_chosen_part_is_reached_at_every_beginning_and_overshot_by_less_than_a_shard():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 50, (200,), generator=generator).tolist()
    for fraction in (0.0, 0.05, 0.5, 0.94, 1.0):
        chosen = chosen_for_host(sizes, fraction)
        gone = list(itertools.accumulate(s * c for s, c in zip(sizes, chosen, strict=True)))
        passed = list(itertools.accumulate(sizes))
        for number, (away, total) in enumerate(zip(gone, passed, strict=True)):
            assert fraction * total <= away < fraction * total + max(sizes[: number + 1])
    assert not any(chosen_for_host(sizes, 0.0))
    assert all(chosen_for_host(sizes, 1.0))
