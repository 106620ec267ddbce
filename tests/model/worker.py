"""What the tests of one layer run on two ranks: ``python -m tests.model.worker JSON``.

The payload is a list of ``{"case": name, "out": directory}``; each rank saves ``RANK.pt`` there.
"""

import json
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

SEQ, BATCH, HEADS = 16, 2, 4
MLA = {
    "num_layers": 1,
    "hidden_size": 48,
    "num_attention_heads": HEADS,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "rope_type": "rope",
    "rotary_base": 10000,
    "normalization": "RMSNorm",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "add_bias_linear": False,
    "qk_layernorm": True,
    "apply_rope_fusion": False,
    "transformer_impl": "local",
    "use_cpu_initialization": True,
}


def seeded(name: str, *shape: int) -> torch.Tensor:
    """A random tensor that depends on its name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def attention_inputs() -> list[torch.Tensor]:
    """q, k, v [s, b, h, d] fp64."""
    widths = {"q": 6, "k": 6, "v": 5}
    return [seeded(name, SEQ, BATCH, HEADS, width).double() for name, width in widths.items()]


def zigzag(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's two chunks of the first dimension."""
    chunks = x.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def context_parallel() -> dict[str, torch.Tensor]:
    """Forward and backward of the core attention on this rank's tokens, natural order unknown."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_k2.model.attention import MLACoreAttention

    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    groups = ProcessGroupCollection()
    groups.tp, groups.cp = alone, dist.group.WORLD
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    core = MLACoreAttention(
        config, 1, AttnMaskType.causal, "self", softmax_scale=0.37, pg_collection=groups
    ).train()
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs = [zigzag(t, rank, size).requires_grad_() for t in attention_inputs()]
    out = core(*inputs)
    direction = zigzag(seeded("direction", *whole_shape(out, size)).double(), rank, size)
    grads = torch.autograd.grad(out, inputs, direction)
    maxima = core.current_max_attn_logits.clone()
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return {
        "out": out.detach(),
        "local_maxima": core.current_max_attn_logits,
        "maxima": maxima,
    } | dict(zip(("q", "k", "v"), grads, strict=True))


def whole_shape(part: torch.Tensor, size: int) -> tuple[int, ...]:
    return (part.shape[0] * size, *part.shape[1:])


def _attention(stock: bool, tp: int, sequence_parallel: bool):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_k2.model.spec import layer_spec

    config = MLATransformerConfig(
        **MLA, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel
    )
    spec = layer_spec(config, is_moe=False, latent_norm_epsilon=1e-6).submodules.self_attention
    if stock:
        spec.module = MLASelfAttention
        del spec.params["latent_norm_epsilon"]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(spec, config=config, layer_number=1, pg_collection=groups).train()


def _split_dim(param: torch.nn.Parameter) -> int | None:
    return param.partition_dim if getattr(param, "tensor_model_parallel", False) else None


def _gathered(part: torch.Tensor, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim)


def latent_attention_gradients(
    stock: bool, tp: int, sequence_parallel: bool
) -> dict[str, torch.Tensor]:
    """Output and gradients of one attention as whole tensors, by parameter name.

    A replicated parameter's gradient is this rank's, summed over the group only where the
    parameter is marked ``sequence_parallel``, as Megatron's ``finalize_model_grads`` does.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1)
    try:
        attention = _attention(stock, tp, sequence_parallel)
        rank = parallel_state.get_tensor_model_parallel_rank()
        for name, param in attention.named_parameters():
            shape, dim = list(param.shape), _split_dim(param)
            if dim is not None:
                shape[dim] *= tp
            whole = seeded(name, *shape) / shape[-1] ** 0.5
            whole = 1 + 0.2 * seeded(name, *shape) if "layernorm" in name else whole
            param.data.copy_(whole if dim is None else whole.chunk(tp, dim)[rank])
        is_cut = tp > 1 and sequence_parallel
        hidden, direction = (seeded(n, SEQ, BATCH, MLA["hidden_size"]) for n in ("in", "out"))
        if is_cut:
            hidden, direction = hidden.chunk(tp)[rank], direction.chunk(tp)[rank]
        hidden = hidden.clone().requires_grad_()
        out, _ = attention(hidden, attention_mask=None)
        out.backward(direction)
        results = {"output": out.detach(), "input": hidden.grad}
        if is_cut:
            results = {name: _gathered(part, 0) for name, part in results.items()}
        for name, param in attention.named_parameters():
            grad, dim = param.grad, _split_dim(param)
            if tp > 1 and getattr(param, "sequence_parallel", False):
                dist.all_reduce(grad)
            results[name] = grad if dim is None or tp == 1 else _gathered(grad, dim)
        return results
    finally:
        parallel_state.destroy_model_parallel()


CASES = {
    "context parallel": context_parallel,
    "K2 one rank": lambda: latent_attention_gradients(False, 1, False),
    "K2 TP2": lambda: latent_attention_gradients(False, 2, False),
    "K2 TP2+SP": lambda: latent_attention_gradients(False, 2, True),
    "upstream one rank": lambda: latent_attention_gradients(True, 1, False),
    "upstream TP2": lambda: latent_attention_gradients(True, 2, False),
    "upstream TP2+SP": lambda: latent_attention_gradients(True, 2, True),
}


def main() -> None:
    from megatron_k2.host.cpu import megatron_host

    with megatron_host() as backend:
        dist.init_process_group(backend)
        for entry in json.loads(Path(sys.argv[1]).read_text()):
            directory = Path(entry["out"])
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(CASES[entry["case"]](), directory / f"{dist.get_rank()}.pt")
        dist.destroy_process_group()


def results_of(cases: list[str], root: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Run ``cases`` on two ranks, one start-up; results by case, then by rank."""
    from tests.support.distributed import run_ranks

    payload = [{"case": case, "out": str(root / str(i))} for i, case in enumerate(cases)]
    run_ranks("tests.model.worker", 2, payload, root / "logs")
    return {
        case: [torch.load(root / str(i) / f"{rank}.pt") for rank in range(2)]
        for i, case in enumerate(cases)
    }


if __name__ == "__main__":
    main()
