"""Log-probabilities on tensor-parallel ranks: ``python -m tests.rl.worker JSON``."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_k2.rl.logprobs import token_logprobs

TOKENS, IDS, PADDED = 37, 21, 24


def drawn(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with three padding columns, targets, temperatures, weights of a loss."""
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(TOKENS, PADDED, generator=generator)
    logits[:, IDS:] = -torch.inf
    targets = torch.randint(IDS, (TOKENS,), generator=generator)
    temperature = 0.5 + torch.rand(TOKENS, generator=generator)
    weights = torch.randn(TOKENS, generator=generator)
    return logits.to(dtype), targets, temperature, weights


def answers(device: torch.device | str, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Of this rank: log-probabilities, entropy, gradient of its columns."""
    logits, targets, temperature, weights = (each.to(device) for each in drawn())
    if group is not None:
        logits = logits.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)].contiguous()
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, targets, temperature, group, chunk_tokens=8)
    (slope,) = torch.autograd.grad((weights * logprobs).sum(), logits)
    return {"logprobs": logprobs.detach(), "entropy": entropy, "slope": slope}


def main() -> None:
    from megatron_k2.engine.mcore.ranks import process_group

    with process_group() as device:
        found = answers(device, dist.group.WORLD)
        out = Path(json.loads(Path(sys.argv[1]).read_text())["out"])
        torch.save({k: v.cpu() for k, v in found.items()}, out / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
