"""The whole optimizer step on a K2-shaped stack: MuonClip against Megatron's own ``muon``.

One dense and four MoE layers of 32 experts, every K2 shape divided by 8 (``--divisor``), bf16
parameters, fp32 masters, synthetic gradients that both get alike. Both optimizers come from
Megatron's factory and step in the same process, in interleaved rounds; neither runs over ZeRO.

* DP1: one rank.
* TP2: two ranks, dense matrices split over both (Megatron's ``duplicated`` mode: gathered and
  orthogonalised on each), experts over both by expert parallelism, as K2's layouts have it.

Both matmul precisions: bf16 (``--muon-fp32-matmul-prec medium`` there, ``--muonclip-dtype bf16``
here) and fp32 (``high``, ``fp32``). The FLOP ratio is derived from the shapes, of the busiest
rank: Megatron's plain form on fused gate/up weights, against what our plan says. Seconds are CPU
seconds of the busiest rank; ours are a MuonClip step whole, QK-Clip and idle floor included.

    python benchmarks/optimizer_step.py
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import machine_lock, print_inputs, print_result

from megatron_k2.flags.megatron import add_k2_arguments, model_flags, platform_flags
from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.presets import ModelPreset, get_preset

STEPS = 5
BAR, SHARE_OF_FLOPS = 2.0, 0.85
NUM_LAYERS, NUM_EXPERTS = 5, 32
GEMM_SIZE = 768


def stack(divisor: int) -> ModelPreset:
    """Kimi K2 with every width and count of heads divided."""
    k2 = get_preset("kimi-k2")
    widths = (
        "hidden_size ffn_hidden_size num_attention_heads q_lora_rank kv_lora_rank "
        "moe_ffn_hidden_size vocab_size"
    ).split()
    return dataclasses.replace(
        k2,
        num_layers=NUM_LAYERS,
        num_moe_experts=NUM_EXPERTS,
        **{name: getattr(k2, name) // divisor for name in widths},
    )


def flags(preset: ModelPreset, world_size: int, precision: str) -> list[str]:
    """What both are built from; each ignores the other's flags."""
    ranks = f"--tensor-model-parallel-size {world_size} --sequence-parallel" * (world_size > 1)
    experts = f"--expert-model-parallel-size {world_size} --expert-tensor-parallel-size 1"
    return [
        *platform_flags(cuda=torch.cuda.is_available()),
        *model_flags(preset),
        *f"""
        --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-4 --weight-decay 0.1
        --seq-length 64 --max-position-embeddings 64 --tokenizer-type NullTokenizer
        --vocab-size {preset.vocab_size} --calculate-per-token-loss --bf16 --clip-grad 1.0
        --optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-scale-mode spectral
        --muon-extra-scale-factor 0.2 --muon-coefficient-type simple --muon-num-ns-steps {STEPS}
        --muon-tp-mode duplicated --qk-clip-threshold 100
        --muon-fp32-matmul-prec {"medium" if precision == "bf16" else "high"}
        --muonclip-dtype {precision} {ranks} {experts}
        """.split(),
    ]


def parse(words: list[str]) -> argparse.Namespace:
    """Megatron's arguments, parsed from ``words`` and validated as a run's are."""
    from megatron.training.arguments import parse_args, validate_args

    before, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # five hundred lines of arguments
            args = parse_args(add_k2_arguments)
            validate_args(args)
    finally:
        sys.argv = before
    return args


class Contestant:
    """A model in Megatron's wrapper and the optimizer its factory gives; steps are timed."""

    def __init__(self, preset: ModelPreset, words: list[str], *, is_muonclip: bool) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.module import Float16Module
        from megatron.training.training import get_megatron_optimizer_config

        from megatron_k2.model.build import K2ModelBuilder, model_config_from_args
        from megatron_k2.training.hooks import TrainingHooks

        args = parse([*words, "--muonclip"] if is_muonclip else words)
        args.padded_vocab_size = preset.vocab_size
        args.optimizer = "muonclip" if is_muonclip else "muon"
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = K2ModelBuilder(model_config_from_args(args)).build_model(groups)
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.ddp = DistributedDataParallel(
            model.config, ddp_config, Float16Module(model.config, model)
        )
        config, overrides = get_megatron_optimizer_config(args)
        with contextlib.redirect_stdout(io.StringIO()):  # the table of parameters
            self.optimizer = TrainingHooks(args, None, None).get_optimizer(
                get_megatron_optimizer, config, [self.ddp], config_overrides=overrides
            )
        for group in self.optimizer.param_groups:  # as Megatron's scheduler does at each step
            group["lr"] = 1e-4
            group["weight_decay"] = 0.1 * group.get("wd_mult", 1.0)
        self.newton_schulz_seconds = 0.0

    def set_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in self.ddp.parameters():
            param.main_grad.copy_(torch.randn(param.shape, generator=generator).mul_(1e-3))

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its CPU seconds added to Newton-Schulz's."""

        def call(*positional: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*positional, **kwargs)
            self.newton_schulz_seconds += time.process_time() - start
            return result

        return call

    def step(self, seed: int) -> tuple[float, float]:
        """(seconds of the step, of Newton-Schulz in it), of this process's CPU."""
        self.set_gradients(seed)
        self.newton_schulz_seconds = 0.0
        torch.distributed.barrier()
        start = time.process_time()
        self.optimizer.step()
        return time.process_time() - start, self.newton_schulz_seconds


def muon_flops(model: torch.nn.Module, world_size: int) -> int:
    """FLOPs of Megatron's ``muon`` on this rank: whole weights, fused ones jointly, plain form."""
    total = 0
    for param in model.parameters():
        if param.ndim == 2 and not getattr(param, "is_embedding_or_output_parameter", False):
            shape = list(param.shape)
            is_split = getattr(param, "allreduce", True) and world_size > 1
            if is_split and getattr(param, "partition_dim", -1) >= 0:
                shape[param.partition_dim] *= world_size
            total += newton_schulz_flops(*shape, (STEPS,), "plain")
    return total


def our_flops(optimizer: Any) -> int:
    """FLOPs of MuonClip on this rank, by its plans."""
    groups = [
        part.optimizer.matrix_group
        for part in optimizer.chained_optimizers
        if hasattr(part.optimizer, "matrix_group")
    ]
    return sum(group.assignment.loads[group.exchange.rank] for group in groups)


@contextlib.contextmanager
def ranks(world_size: int) -> Iterator[None]:
    """Megatron's groups over the processes that share MASTER_PORT."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_k2.host.cpu import megatron_host

    with megatron_host() as backend:
        torch.distributed.init_process_group(backend)
        parallel_state.initialize_model_parallel(
            world_size, expert_model_parallel_size=world_size, expert_tensor_parallel_size=1
        )
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def worker(divisor: int, precision: str, rounds: int, seed: int, out: Path) -> None:
    """One rank: both contestants, interleaved; writes its samples."""
    import megatron_k2.optimizer.sharded.matrix_group as domain_module

    torch.set_num_threads(1)
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    preset = stack(divisor)
    words = flags(preset, world_size, precision)
    with ranks(world_size):
        from emerging_optimizers.orthogonalized_optimizers import muon_utils

        ours = Contestant(preset, words, is_muonclip=True)
        theirs = Contestant(preset, words, is_muonclip=False)
        domain_module.orthogonalize = ours.timed(domain_module.orthogonalize)
        muon_utils.newton_schulz = theirs.timed(muon_utils.newton_schulz)
        samples: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        contestants = {"ours": ours, "theirs": theirs}
        order = random.Random(seed)
        square = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=getattr(torch, _dtype(precision)))
        gemm = []
        for number in range(rounds + 1):
            start = time.process_time()
            _ = square @ square
            gemm.append(time.process_time() - start)
            for name in order.sample(list(contestants), 2):
                sample = contestants[name].step(seed + number)
                if number:  # the first round allocates the states
                    samples[name].append(sample)
        found = {
            "samples": samples,
            "our_flops": our_flops(ours.optimizer),
            "muon_flops": muon_flops(theirs.ddp, world_size),
            "parameters": sum(p.numel() for p in ours.ddp.parameters()),
            "peak": 2 * GEMM_SIZE**3 / statistics.median(gemm),
        }
    (out / f"rank{rank}.json").write_text(json.dumps(found))


def _dtype(precision: str) -> str:
    return {"bf16": "bfloat16", "fp32": "float32"}[precision]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_case(world_size: int, precision: str, arguments: argparse.Namespace) -> list[Any]:
    """Start the ranks; what each found."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--worker", folder, "--precision", precision]
        for name in ("divisor", "rounds", "seed"):
            command += [f"--{name}", str(getattr(arguments, name))]
        started = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for rank in range(world_size)
        ]
        errors = [process.communicate()[1].decode() for process in started]
        for process, error in zip(started, errors, strict=True):
            if process.returncode:
                raise SystemExit(f"a rank failed:\n{error[-3000:]}")
        return [json.loads((Path(folder) / f"rank{r}.json").read_text()) for r in range(world_size)]


def report(label: str, found: list[Any]) -> dict[str, float]:
    """Print a case; its ratios."""
    rounds = range(len(found[0]["samples"]["ours"]))

    def median(name: str, part: int) -> float:
        busiest = [max(rank["samples"][name][i][part] for rank in found) for i in rounds]
        return statistics.median(busiest)

    flops = {
        "ours": max(r["our_flops"] for r in found),
        "theirs": max(r["muon_flops"] for r in found),
    }
    flop_ratio = flops["theirs"] / flops["ours"]
    print(f"\n{label}: {found[0]['parameters'] / 1e6:.1f} M parameters a rank")
    print("| | GFLOP | step ms | Newton-Schulz ms | floor ms | elementwise and rest ms |")
    print("|---|---|---|---|---|---|")
    for name, title in (("theirs", "Megatron muon"), ("ours", "MuonClip")):
        step, inner = median(name, 0) * 1e3, median(name, 1) * 1e3
        floor = flops[name] / found[0]["peak"] * 1e3
        print(
            f"| {title} | {flops[name] / 1e9:.0f} | {step:.0f} | {inner:.0f} | {floor:.0f} "
            f"| {step - inner:.0f} |"
        )
    ratio = median("theirs", 0) / median("ours", 0)
    inner_ratio = median("theirs", 1) / median("ours", 1)
    rest_ratio = (median("theirs", 0) - median("theirs", 1)) / (
        median("ours", 0) - median("ours", 1)
    )
    print(
        f"step {ratio:.2f}x (bar {BAR}), Newton-Schulz {inner_ratio:.2f}x, rest {rest_ratio:.2f}x; "
        f"FLOPs {flop_ratio:.2f}x, of which the step reaches {ratio / flop_ratio:.0%} "
        f"(bar {SHARE_OF_FLOPS:.0%}) and Newton-Schulz {inner_ratio / flop_ratio:.0%}"
    )
    return {
        f"{label}_ratio": ratio,
        f"{label}_newton_schulz_ratio": inner_ratio,
        f"{label}_flop_ratio": flop_ratio,
        f"{label}_share": ratio / flop_ratio,
    }


def whole_k2_flop_ratio() -> float:
    """All matrices of Kimi K2 once, bf16: Megatron's way over ours."""
    from megatron_k2.planning.cost.flops import orthogonalisation
    from megatron_k2.planning.cost.matrices import weight_roles
    from megatron_k2.planning.cost.shapes import rank_weights

    k2 = get_preset("kimi-k2")
    layers = range(k2.num_layers)
    ends = {"has_embedding": True, "has_head": True}
    weights = rank_weights(k2, layers, tp=1, ep=1, **ends)
    theirs, mine = 0, orthogonalisation(k2)
    for weight, role in zip(weights, weight_roles(k2, layers, ep=1, **ends), strict=True):
        if role.num_blocks:
            rows, cols = weight.shape
            theirs += newton_schulz_flops(rows, cols, (STEPS,), "plain")
    print(f"\nall of K2, bf16: {theirs / 1e15:.1f} PFLOP there, {mine / 1e15:.1f} here")
    return theirs / mine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--divisor", type=int, default=8, help="of every K2 shape (default 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="1: DP1; 2: TP2")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(
            arguments.divisor,
            arguments.precision,
            arguments.rounds,
            arguments.seed,
            arguments.worker,
        )
        return
    try:
        import emerging_optimizers  # noqa: F401  (Megatron's muon is built on it)
    except ImportError as error:
        raise SystemExit(
            "Megatron's muon needs Emerging-Optimizers: pip install emerging-optimizers"
        ) from error
    figures: dict[str, float] = {}
    with machine_lock():
        print_inputs(**vars(arguments))
        for world_size in arguments.ranks:
            for precision in arguments.precisions:
                label = f"{'dp1' if world_size == 1 else f'tp{world_size}'}_{precision}"
                figures |= report(label, run_case(world_size, precision, arguments))
    figures["k2_flop_ratio_bf16"] = whole_k2_flop_ratio()
    print_result(**figures)


if __name__ == "__main__":
    main()
