"""One forward and backward pass on two ranks: ``python -m tests.te.worker JSON``.

The payload is a list of ``{"case": name, "out": directory}``; each rank saves ``RANK.pt`` there:
its loss, and every gradient as a whole tensor by the local modules' name. Reductions are written
out here, as Megatron's ``finalize_model_grads`` and DDP do them: a parameter that every
tensor-parallel rank holds whole is summed over them if it is marked ``sequence_parallel``, experts
are summed over the ranks that hold copies of them, all else over the data-parallel ranks.
"""

import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.model.worker import seeded
from tests.support.single_rank import SMALL

FLAGS = "--moe-aux-loss-coeff 0 --micro-batch-size 1 --global-batch-size 2".split()
LAYOUTS = {
    "TP2+SP": "--tensor-model-parallel-size 2 --sequence-parallel "
    "--expert-tensor-parallel-size 1".split(),
    "EP2": "--expert-model-parallel-size 2".split(),
}
SIZES = {
    "TP2+SP": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "EP2": {"expert_model_parallel_size": 2},
}


def is_expert(name: str) -> bool:
    return ".local_experts." in name


def whole_weight(name: str, shape: list[int]) -> torch.Tensor:
    """The unsharded parameter, from its name alone."""
    values = seeded(name, *shape)
    return 1 + 0.2 * values if "norm" in name else values * shape[-1] ** -0.5


def _halves(name: str, part: torch.Tensor) -> list[torch.Tensor]:
    """Gate and up of a fused weight, which are split one by one; anything else whole."""
    return list(part.chunk(2)) if "linear_fc1.weight" in name else [part]


def cut(name: str, whole: torch.Tensor, dim: int | None, rank: int) -> torch.Tensor:
    if dim is None:
        return whole
    return torch.cat([half.chunk(2, dim)[rank] for half in _halves(name, whole)])


def joined(name: str, part: torch.Tensor, dim: int | None) -> torch.Tensor:
    if dim is None:
        return part
    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part.contiguous())
    pairs = zip(*(_halves(name, p) for p in parts), strict=True)
    return torch.cat([torch.cat(pair, dim) for pair in pairs])


def global_name(name: str, first_expert: int) -> str:
    """With the expert's number in the whole model."""
    return re.sub(
        r"local_experts\.(\d+)",
        lambda found: f"local_experts.{int(found[1]) + first_expert}",
        name,
    )


def parameters(model, layout: str, rank: int):
    """(name in the whole model, parameter, dimension split over tensor-parallel ranks)."""
    from tests.te.models import local_name

    first = rank * SMALL.num_moe_experts // 2 if layout == "EP2" else 0
    for te_name, param in model.named_parameters():
        name = local_name(te_name)
        is_split = layout == "TP2+SP" and getattr(param, "tensor_model_parallel", False)
        dim = param.partition_dim if is_split and not is_expert(name) else None
        yield global_name(name, first), param, dim


def fill(model, layout: str, rank: int) -> None:
    for name, param, dim in parameters(model, layout, rank):
        shape = list(param.shape)
        if dim is not None:
            shape[dim] *= 2
        param.data.copy_(cut(name, whole_weight(name, shape), dim, rank))


def summed(model, layout: str, rank: int) -> dict[str, torch.Tensor]:
    """Whole gradients; ``unreduced`` ones, before any sum over ranks, under a name of their own."""
    results = {}
    for name, param, dim in parameters(model, layout, rank):
        grad = param.grad.clone()
        results[f"unreduced {name}"] = grad.clone()
        if layout == "EP2" and not is_expert(name):
            dist.all_reduce(grad)
        if layout == "TP2+SP" and (
            is_expert(name) or (dim is None and getattr(param, "sequence_parallel", False))
        ):
            dist.all_reduce(grad)
        results[name] = joined(name, grad, dim) / (2 if layout == "EP2" else 1)
    return results


def run(layout: str) -> dict[str, torch.Tensor]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from tests.support.single_rank import build
    from tests.te.models import TE_FLAGS, batch, token_losses

    parallel_state.initialize_model_parallel(**SIZES[layout])
    model_parallel_cuda_manual_seed(1)
    try:
        model = build(SMALL, *TE_FLAGS, *FLAGS, *LAYOUTS[layout]).train()
        rank = dist.get_rank()
        fill(model, layout, rank)
        tokens, positions, labels = batch()
        if layout == "EP2":
            tokens, positions, labels = (t[rank : rank + 1] for t in (tokens, positions, labels))
        loss = token_losses(model, tokens, positions, labels).mean()
        loss.backward()
        found = {"loss": loss.detach()} | summed(model, layout, rank)
        return {name: value.cpu() for name, value in found.items()}
    finally:
        parallel_state.destroy_model_parallel()


def main() -> None:
    from tests.te.standin import prepare

    prepare()
    from megatron_k2.host.cpu import megatron_host

    with megatron_host() as backend:
        dist.init_process_group(backend)
        for entry in json.loads(Path(sys.argv[1]).read_text()):
            directory = Path(entry["out"])
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(run(entry["case"]), directory / f"{dist.get_rank()}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
