"""Upstream's defects, one function each, run on two ranks by ``test_megatron_core.py``.

Each says what is wrong in a sentence, or "" where nothing is; an exception is a defect too. Rank 0
writes all of them to ``OUT`` as JSON. Run over the released wheel and over the patched one.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.model.worker import _attention, latent_attention_gradients, seeded
from tests.support.offload_states import between_two_layers, on_the_host

TAU = 100.0


def mla_rotary_key_gradient() -> str:
    """The shared rotary key's gradient is one rank's share at TP2."""
    name = "linear_kv_down_proj.weight"
    whole = latent_attention_gradients(stock=True, tp=1, sequence_parallel=False)[name]
    errors = []
    for sequence_parallel in (False, True):
        found = latent_attention_gradients(stock=True, tp=2, sequence_parallel=sequence_parallel)
        errors.append(((found[name] - whole).abs().max() / whole.abs().max()).item())
    return "" if max(errors) < 2e-6 else f"relative errors of the gradient {errors}"


def _clippable(dtype: torch.dtype = torch.float32):
    """Stock attention of one rank whose four heads had these maxima."""
    attention = _attention(stock=True, tp=1, sequence_parallel=False).to(dtype)
    for key, value in {"qk_clip": True, "qk_clip_threshold": TAU, "qk_clip_alpha": 0.5}.items():
        setattr(attention.config, key, value)
    for name, param in attention.named_parameters():
        param.data.copy_(seeded(name, *param.shape))
    return attention


def _q_heads(attention) -> torch.Tensor:
    return attention.linear_q_up_proj.weight.detach().float().view(4, -1)


def qk_clip_factors() -> str:
    """A negative maximum makes NaN, an infinite one wipes the head, NaN ends the job."""
    attention = _single_rank(_clippable)
    before = _q_heads(attention).clone()
    maxima = torch.tensor([-3.0, 2 * TAU, float("inf"), float("nan")])
    attention.core_attention.current_max_attn_logits = maxima
    attention.clip_qk()
    ratio = (_q_heads(attention) / before).nan_to_num(-1)
    expected = torch.ones(4, 24)
    expected[1] = torch.cat([torch.full((16,), 0.5**0.5), torch.full((8,), 0.5)])
    wrong = (ratio.view(4, 24, -1) - expected[..., None]).abs().amax((1, 2)) > 1e-6
    return "" if not wrong.any() else f"heads {wrong.nonzero().flatten().tolist()} are scaled wrong"


def qk_clip_sharded_main_params() -> str:
    """The clip fails on the flat shards of the distributed optimizer's main parameters."""

    def run():
        attention = _clippable(torch.bfloat16)
        _distributed_optimizer(attention, bf16=True)
        attention.core_attention.current_max_attn_logits = torch.tensor([1, 2, 3, 4]) * TAU
        expected = _q_heads(attention).clone().view(4, 24, -1)
        factor = 1 / torch.arange(1, 5)[:, None, None]
        expected[:, :16] *= factor**0.5
        expected[:, 16:] *= factor
        attention.clip_qk()
        weight = attention.linear_q_up_proj.weight
        shard = weight.main_param
        pieces = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, None if shard is None else shard.detach().cpu())
        whole = torch.cat([piece.flatten() for piece in pieces if piece is not None])
        return (whole - expected.flatten()).abs().max().item()

    error = _single_rank(run)
    return "" if error < 1e-5 else f"main parameters are off by {error}"


def interleaved_p2p_two_stages() -> str:
    """With two pipeline ranks the batched sends of an interleaved schedule cross over."""
    from megatron.core.pipeline_parallel import p2p_communication

    other = 1 - dist.get_rank()
    tensors = {f"tensor_send_{to}": torch.tensor(float(i)) for i, to in enumerate(("prev", "next"))}
    from_prev, from_next = torch.full((2,), -1.0).unbind()
    requests = p2p_communication._batched_p2p_ops(
        **tensors,
        tensor_recv_prev=from_prev,
        tensor_recv_next=from_next,
        group=dist.group.WORLD,
        prev_pipeline_rank=other,
        next_pipeline_rank=other,
    )
    for request in requests:
        request.wait()
    # What came from the previous rank is what that one sent to its next, and the other way round.
    crossed = (from_prev.item(), from_next.item()) != (1.0, 0.0)
    return f"previous gave {from_prev.item()}, next gave {from_next.item()}" if crossed else ""


class _Matrices(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        for index in range(count):
            name = f"matrix{index}"
            setattr(self, name, torch.nn.Parameter(seeded(name, 10, 15)))


def _distributed_optimizer(model: torch.nn.Module, bf16: bool = False, **ddp):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        use_cpu_initialization=True,
        bf16=bf16,
        params_dtype=dtype,
    )
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, **ddp)
    wrapped = DistributedDataParallel(config, ddp_config, model)
    wrapped.ddp_config = ddp_config
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        bf16=bf16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        clip_grad=0.0,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped])
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    return wrapped, getattr(optimizer, "chained_optimizers", [optimizer])[0]


def optimizer_resume_shared_step() -> str:
    """After a load all parameters share one step, which AdamW increments once for each."""

    def run():
        wrapped, optimizer = _distributed_optimizer(_Matrices(4))
        for _ in range(2):
            for param in wrapped.parameters():
                param.main_grad.copy_(torch.ones_like(param))
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        return [state["step"].item() for state in optimizer.optimizer.state.values()]

    steps = _single_rank(run)
    return "" if set(steps) == {2.0} else f"steps {steps} after two steps"


def fully_reshardable_padding() -> str:
    """Parameters are saved shifted where buckets are padded."""
    from megatron.core.dist_checkpointing import ShardedTensor

    def run():
        wrapped, optimizer = _distributed_optimizer(
            _Matrices(4), overlap_grad_reduce=True, bucket_size=200
        )
        for group in optimizer.optimizer.param_groups:
            group["lr"] = 0.0
        optimizer._init_optimizer_states_with_dummy_values()
        named = dict(wrapped.named_parameters())
        model = {
            name: ShardedTensor.from_rank_offsets(name, param, replica_id=(0, 0, dist.get_rank()))
            for name, param in named.items()
        }
        saved = optimizer.sharded_param_state_fully_reshardable(model, metadata={})
        found = {
            entry.key.removeprefix("optimizer.state.param."): entry.data
            for tensors in saved.values()
            for key, entry in tensors.items()
            if key == "param"
        }
        return max((found[name] - param).abs().max().item() for name, param in named.items())

    error = _single_rank(run)
    return "" if error == 0 else f"saved main parameters are off by {error}"


def yarn_flags_for_mla() -> str:
    """YaRN's flags are accepted and ignored for MLA."""
    from megatron.training.arguments import core_transformer_config_from_args

    from tests.support.single_rank import SMALL, arguments

    flags = "--global-batch-size 2 --rope-type yarn --yarn-beta-fast 7 --yarn-beta-slow 3".split()
    args = arguments(SMALL, *flags)
    config = core_transformer_config_from_args(args)
    found = config.beta_fast, config.beta_slow
    return "" if found == (7, 3) else f"beta fast and slow are {found}, not the flags' (7, 3)"


def activation_offload_chunk_end() -> str:
    """A chunk of which another group is to come is taken for finished."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler

    chunk = between_two_layers()
    is_over = ChunkOffloadHandler.finish_all_groups(chunk, "moe_act")
    return "left before its second group" if is_over else ""


def activation_offload_inline_reload() -> str:
    """A reload reads the host's buffer before the copy that fills it has ended."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler

    events: list[str] = []
    handler, tag = on_the_host(events)
    current_stream, torch.cuda.current_stream = torch.cuda.current_stream, lambda: None
    try:
        ChunkOffloadHandler.tensor_pop(handler, tag)
    finally:
        torch.cuda.current_stream = current_stream
    return "" if events == ["wait", "reload"] else f"only {', '.join(events)}"


def _single_rank[T](run: Callable[[], T]) -> T:
    """``run()`` with Megatron's groups over all ranks by data parallelism."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    try:
        return run()
    finally:
        parallel_state.destroy_model_parallel()


REPRODUCTIONS = (
    mla_rotary_key_gradient,
    qk_clip_factors,
    qk_clip_sharded_main_params,
    interleaved_p2p_two_stages,
    optimizer_resume_shared_step,
    fully_reshardable_padding,
    yarn_flags_for_mla,
    activation_offload_chunk_end,
    activation_offload_inline_reload,
)


def main(out: Path) -> None:
    from megatron_k2.host.cpu import megatron_host

    with megatron_host() as backend:
        dist.init_process_group(backend)
        found = {}
        for reproduction in REPRODUCTIONS:
            try:
                found[reproduction.__name__] = reproduction()
            except Exception as error:
                found[reproduction.__name__] = repr(error)
        if dist.get_rank() == 0:
            out.write_text(json.dumps(found))
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(json.loads(Path(sys.argv[1]).read_text())))
