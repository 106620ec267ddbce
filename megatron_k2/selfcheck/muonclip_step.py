"""Step: MuonClip on the device, plain and over ZeRO-1, against the CPU's update.

Gradients and maximum logits are drawn on the CPU and put in, so that both sides' optimizers see the
same numbers. After each of three steps every bf16 weight must be its fp32 master rounded, bit for
bit, and none of our modules may have made the host wait for the device
(``torch.cuda.set_sync_debug_mode``). Newton-Schulz runs in fp32 for the comparison, as in
``tests/parallel``: in bf16 a rounding of the input moves the result by several percent.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import megatron_k2
from megatron_k2.presets import K2_TINY
from megatron_k2.selfcheck.findings import Figure, Findings, judged
from megatron_k2.selfcheck.one_rank import arguments, build, one_rank, randomise
from megatron_k2.selfcheck.two_sides import both_sides

STEPS, LR, DECAY, HOT_FROM = 3, 0.02, 0.1, 20.0
UPDATE_BAR = 1e-4
"""Of ‖update‖: five fp32 steps, each of which multiplies small singular values by 3.4."""
FLAGS = f"""
    --bf16 --optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-scale-mode spectral
    --muon-extra-scale-factor 0.2 --muon-coefficient-type simple --muon-num-ns-steps 5
    --weight-decay {DECAY} --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --qk-clip-threshold {HOT_FROM} --muonclip --muonclip-dtype fp32
""".split()
KINDS = ("plain", "ZeRO-1")


def side(workload: str) -> dict[str, Any]:
    """For each kind: masters after the steps, the update's part, weights not rounded, waits."""
    del workload
    with one_rank():
        return {kind: _steps(is_sharded=kind == "ZeRO-1") for kind in KINDS}


def _built(*, is_sharded: bool) -> tuple[Any, Any, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_k2.training.hooks import TrainingHooks

    host = ["--optimizer", "adam", "--use-distributed-optimizer"] if is_sharded else []
    args = arguments(K2_TINY, *FLAGS, *host)
    args.optimizer = "adam" if is_sharded else "muonclip"
    model = build(K2_TINY, *FLAGS).train()
    randomise(model)
    wrapped = Float16Module(model.config, model)
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=is_sharded, grad_reduce_in_fp32=True
    )
    ddp = DistributedDataParallel(model.config, config, wrapped)
    optimizer_config, overrides = get_megatron_optimizer_config(args)
    hooks = TrainingHooks(args, None, None)
    optimizer = hooks.get_optimizer(
        get_megatron_optimizer, optimizer_config, [ddp], config_overrides=overrides
    )
    for group in optimizer.param_groups:
        group["lr"] = LR  # as Megatron's scheduler does before each step
        group["weight_decay"] = DECAY * group.get("wd_mult", 1.0)
    return ddp, optimizer, hooks.max_logits


def _steps(*, is_sharded: bool) -> dict[str, Any]:
    ddp, optimizer, maxima = _built(is_sharded=is_sharded)
    before = {n: p.detach().float().cpu().clone() for n, p in ddp.named_parameters()}
    waits: Counter[str] = Counter()
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for param in ddp.parameters():
            param.main_grad.copy_(1e-3 * torch.randn(param.shape, generator=generator))
        heads = 10 + 15 * torch.rand(maxima.running.shape, generator=generator)
        maxima.running.copy_(heads)
        with _counted_waits(waits if step else Counter()):
            optimizer.step()
    masters = _masters(ddp, optimizer)
    return {
        "masters": {name: master.cpu() for name, master in masters.items()},
        "before": before,
        "not rounded": sum(
            not torch.equal(param.detach().flatten(), masters[name].to(param.dtype).flatten())
            for name, param in ddp.named_parameters()
        ),
        "waits": dict(waits),
    }


def _masters(ddp: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """The fp32 weights behind each parameter, by its name; with one rank a shard is the whole."""
    by_param: dict[Any, Any] = {}
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for models, masters in zip(
            getattr(inner, "model_float16_groups", None) or inner.float16_groups,
            getattr(inner, "shard_fp32_from_float16_groups", None)
            or inner.fp32_from_float16_groups,
            strict=True,
        ):
            by_param.update(zip(models, masters, strict=True))
    named = dict(ddp.named_parameters())
    return {
        name: (by_param[param] if param in by_param else param).detach().float().view_as(param)
        for name, param in named.items()
    }


@contextmanager
def _counted_waits(found: Counter[str]) -> Iterator[None]:
    """Count the places of this package at which the host waits for a CUDA device."""
    if not torch.cuda.is_available():
        yield
        return
    (package,) = megatron_k2.__path__

    def note(*_warning: Any, **_how: Any) -> None:
        for frame in reversed(traceback.extract_stack()):
            path = frame.filename
            if "/torch/" in path or path == __file__ or path.endswith("warnings.py"):
                continue
            if path.startswith(package):
                found[f"{Path(path).relative_to(package)}:{frame.lineno}"] += 1
            return

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def measure(device: str, workload: str) -> Findings:
    """Both sides, compared."""
    found, expected = both_sides(__name__, device, workload)
    figures, waits = [], Counter[str]()
    for kind in KINDS:
        ours, theirs = found[kind], expected[kind]
        difference = update = 0.0
        for name, master in theirs["masters"].items():
            difference += float((ours["masters"][name] - master).double().square().sum())
            update += float((master - theirs["before"][name]).double().square().sum())
        figures += [
            Figure(
                f"{kind}: update, ‖difference‖ / ‖update‖",
                (difference / update) ** 0.5,
                bar=UPDATE_BAR,
            ),
            Figure(f"{kind}: weights that are not round(master)", ours["not rounded"], bar=0),
        ]
        waits.update(ours["waits"])
    if device == "cuda":
        figures.append(Figure("waits for the device in our modules", sum(waits.values()), bar=0))
    places = ", ".join(f"{place} x{count}" for place, count in waits.most_common(4))
    return judged(f"{STEPS} steps{'; waits at ' + places if places else ''}", figures)
