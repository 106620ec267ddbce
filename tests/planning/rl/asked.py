"""K2's reinforcement learning as tests ask the planner for it."""

from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.rl.lengths import Lengths
from megatron_k2.planning.rl.request import EngineLayout, RlRequest
from megatron_k2.presets import KIMI_K2

LENGTHS = Lengths(median=4096, sigma=1.0, most=31744, prompt=1024)


def trainer(gpu="h800", world_size=256, **changes):
    return RunRequest(
        preset=KIMI_K2, gpu=get_gpu(gpu), world_size=world_size, seq_length=32768,
        sequences_per_step=256, tp=8, pp=8, cp=4, ep=32, has_overlap=False,
        document_tokens=LENGTHS.document_tokens, activation_offload=0.5, **changes,
    )  # fmt: skip


def request(gpu="h800", nodes=4, world_size=256, *, tp=1, slots=None, **changes):
    replicas = world_size // 8 // nodes
    engines = EngineLayout(replicas, nodes, tp=tp, slots=slots or 2048 // replicas)
    given = {
        "engines": engines,
        "lengths": LENGTHS,
        "group_size": 8,
        "mini_batches": 4,
        "groups_in_play": 192,
    }
    return RlRequest(trainer=trainer(gpu, world_size), **given | changes)
