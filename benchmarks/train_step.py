"""One training step of k2-tiny: Megatron with our modules and MuonClip, against plain transformers.

Ours runs as training does: Megatron's schedule, its DDP wrapper and gradient finalisation, the
optimizer object of its factory with MuonClip registered; gradient clipping, balance loss and
QK-Clip included. The peer is transformers' ``DeepseekV3ForCausalLM`` from the same weights in a
plain loop with a textbook Muon and AdamW (``plain_torch_peer.py``), in the fastest of the
implementations that transformers offers, and outside the CPU host's redirections. Same tokens,
fp32, one thread, subnormal numbers flushed for both. Times are medians over interleaved rounds; the
ratios are of process CPU time, which other work on the machine disturbs least.

    python benchmarks/train_step.py --batch 8 --seq 256
"""

import argparse
import contextlib
import io
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from harness import Timing, machine_lock, print_inputs, print_result, summarize
from plain_torch_peer import Peer
from torch import Tensor

from megatron_k2.checkpoint.hf.config import hf_config, without_yarn
from megatron_k2.checkpoint.names.mapping import classic_from_transformers, hf_state_to_megatron
from megatron_k2.flags.megatron import add_k2_arguments, expand
from megatron_k2.host.cpu import megatron_host
from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.presets import ModelPreset, get_preset

GEMM_SIZE = 768
LR, DECAY = 1e-3, 0.1
LOSS_TOLERANCE = 1e-4
"""Both start from the same weights: their first losses differ by rounding only."""
SLOW = 2.0
"""An implementation this much slower than the fastest on one sequence is not tried on all."""


class Ours:
    """The model in Megatron's wrapper, and the optimizer that training would use."""

    def __init__(
        self, preset: ModelPreset, batch: int, seq: int, peer: Peer, flags: tuple[str, ...] = ()
    ) -> None:
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training import training

        from megatron_k2.model.build import K2ModelBuilder, model_config_from_args
        from megatron_k2.training.hooks import TrainingHooks

        args = _megatron_arguments(preset, batch, seq, flags)
        self.shape = (batch, seq)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = K2ModelBuilder(model_config_from_args(args)).build_model(groups).train()
        state = classic_from_transformers(peer.model.state_dict())
        model.load_state_dict(hf_state_to_megatron(state, preset), strict=False)
        ddp = DistributedDataParallel(model.config, training.get_megatron_ddp_config(args), model)
        config, overrides = training.get_megatron_optimizer_config(args)
        hooks = TrainingHooks(args, None, None)
        self.ddp = ddp
        self.optimizer = hooks.get_optimizer(
            get_megatron_optimizer, config, [ddp], config_overrides=overrides
        )
        for group in self.optimizer.param_groups:  # as Megatron's scheduler does at each step
            group["lr"] = LR
            group["weight_decay"] = DECAY * group.get("wd_mult", 1.0)
        model.config.grad_scale_func = self.optimizer.scale_loss
        self.positions = torch.arange(seq).expand(batch, seq)
        self.mask = torch.ones(batch, seq)

    def forward_backward(self, tokens: Tensor, labels: Tensor) -> float:
        from megatron_k2.training.providers import loss_func

        def forward_step(iterator: Iterator[tuple[Tensor, Tensor]], model: torch.nn.Module):  # noqa: ANN202
            inputs, targets = next(iterator)
            output = model(inputs, self.positions, None, labels=targets, loss_mask=self.mask)
            return output, partial(loss_func, self.mask)

        return self.run(forward_step, [(tokens, labels)], *self.shape)

    def run(
        self, forward_step: Callable[..., object], batches: list, batch: int, seq: int
    ) -> float:
        """Megatron's schedule over micro-batches of a shape; the loss of all of them."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=seq,
            micro_batch_size=batch,
            decoder_seq_length=seq,
            forward_only=False,
        )
        total, count = torch.stack([report["lm loss"] for report in reports]).sum(0).tolist()
        return total / count

    def optimizer_step(self) -> None:
        self.optimizer.step()


def _megatron_arguments(
    preset: ModelPreset, batch: int, seq: int, more: tuple[str, ...]
) -> argparse.Namespace:
    from megatron.training.arguments import parse_args, validate_args

    flags = expand(
        f"--preset {preset.name} --mock-data --lr {LR} --micro-batch-size {batch} "
        f"--global-batch-size {batch} --seq-length {seq} --max-position-embeddings {seq}".split(),
        cuda=torch.cuda.is_available(),
    )
    flags += more
    before, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # five hundred lines of arguments
            args = parse_args(add_k2_arguments)
            validate_args(args)
    finally:
        sys.argv = before
    args.padded_vocab_size = preset.vocab_size
    args.optimizer = "muonclip"
    return args


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, and Megatron's groups over it."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        with megatron_host() as backend:
            rendezvous = f"file://{Path(folder) / 'rendezvous'}"
            torch.distributed.init_process_group(
                backend, init_method=rendezvous, rank=0, world_size=1
            )
            parallel_state.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


@dataclass
class Clock:
    """Wall and CPU seconds of each named part, a sample a call."""

    samples: dict[str, list[tuple[float, float]]]

    def measure(self, name: str, call: Callable[[], object]) -> object:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        sample = (time.perf_counter() - wall, time.process_time() - cpu)
        self.samples.setdefault(name, []).append(sample)
        return result


def choose_implementation(peer: Peer, tokens: Tensor, labels: Tensor) -> tuple[str, str]:
    """The fastest of transformers' implementations here: first by one sequence, then by all."""

    def seconds(choice: tuple[str, str], num_sequences: int) -> float:
        peer.use(*choice)
        samples = []
        for _ in range(3):
            start = time.process_time()
            peer.forward_backward(tokens[:num_sequences], labels[:num_sequences])
            samples.append(time.process_time() - start)
        return min(samples)

    one: dict[tuple[str, str], float] = {}
    for choice in peer.implementations():
        try:
            one[choice] = seconds(choice, 1)
        except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0][:90]
            print(f"peer {'/'.join(choice)}: does not run here ({reason})")
    near = [choice for choice in one if one[choice] <= SLOW * min(one.values())]
    full = {choice: seconds(choice, len(tokens)) for choice in near}
    for choice, value in one.items():
        whole = f", all {full[choice] * 1e3:.0f} ms" if choice in full else ""
        print(f"peer {'/'.join(choice)}: one sequence {value * 1e3:.0f} ms{whole}")
    return min(full, key=lambda choice: full[choice])


def model_flops(preset: ModelPreset, batch: int, seq: int) -> int:
    """FLOPs of forward and backward that the model itself asks for, causal half of attention."""
    widths = preset.qk_head_dim + preset.qk_pos_emb_head_dim + preset.v_head_dim
    attention = preset.num_layers * preset.num_attention_heads * seq * (seq + 1) * widths
    return batch * (6 * count_parameters(preset).activated * seq + 3 * attention)


def optimizer_flops(peer: Peer) -> int:
    """FLOPs of Newton-Schulz on every matrix, in the cheaper form; the rest is memory traffic."""
    shapes = [
        matrix.shape
        for group in peer.muon.param_groups
        for param in group["params"]
        for matrix in peer.muon._matrices(param)
    ]
    return sum(newton_schulz_flops(rows, cols, (5,)) for rows, cols in shapes)


def run(ours: Ours, peer: Peer, batches: list[tuple[Tensor, Tensor]], seed: int) -> Clock:
    """Interleaved steps, one of each a round in random order; the first round is not counted."""
    clock, order = Clock({}), random.Random(seed)
    square = torch.randn(GEMM_SIZE, GEMM_SIZE)

    def step(name: str, candidate: Ours | Peer, batch: tuple[Tensor, Tensor]) -> float:
        host = megatron_host() if name == "ours" else contextlib.nullcontext()
        with host:
            torch.set_flush_denormal(True)
            loss = clock.measure(f"{name} fb", lambda: candidate.forward_backward(*batch))
            clock.measure(f"{name} optimizer", candidate.optimizer_step)
        return float(loss)  # type: ignore[arg-type]

    for i, batch in enumerate(batches):
        losses = {}
        candidates = [("ours", ours), ("peer", peer)]
        for name, candidate in order.sample(candidates, 2):
            losses[name] = step(name, candidate, batch)
        clock.measure("gemm", lambda: square @ square)
        if i == 0:
            difference = abs(losses["ours"] - losses["peer"])
            print(f"first loss: ours {losses['ours']:.6f}, peer {losses['peer']:.6f}")
            if difference > LOSS_TOLERANCE:
                raise SystemExit(f"the two are not the same model: losses differ {difference:.1e}")
            clock.samples.clear()
    return clock


def report(clock: Clock, preset: ModelPreset, peer: Peer, batch: int, seq: int) -> None:
    parts = {name: summarize(samples) for name, samples in clock.samples.items()}
    peak = 2 * GEMM_SIZE**3 / parts["gemm"].cpu_seconds
    flops = {"fb": model_flops(preset, batch, seq), "optimizer": optimizer_flops(peer)}
    print(f"ceiling: {peak / 1e9:.0f} GFLOP/s, a {GEMM_SIZE}³ GEMM in float32 in the same rounds")
    print("| part | CPU ms | wall ms | spread | floor ms | of floor |")
    print("|---|---|---|---|---|---|")
    for name in ("ours fb", "peer fb", "ours optimizer", "peer optimizer"):
        timing: Timing = parts[name]
        floor = flops[name.split()[1]] / peak
        print(
            f"| {name} | {timing.cpu_seconds * 1e3:.1f} | {timing.wall_seconds * 1e3:.1f} "
            f"| {timing.spread:.2f} | {floor * 1e3:.1f} | {timing.cpu_seconds / floor:.1f} |"
        )

    def total(name: str) -> float:
        return parts[f"{name} fb"].cpu_seconds + parts[f"{name} optimizer"].cpu_seconds

    def steps(name: str) -> list[float]:
        both = zip(clock.samples[f"{name} fb"], clock.samples[f"{name} optimizer"], strict=True)
        return [forward_backward[1] + step[1] for forward_backward, step in both]

    pairs = [mine / other for mine, other in zip(steps("ours"), steps("peer"), strict=True)]
    print(
        f"rounds: ratio of each, median {statistics.median(pairs):.3f}, from {min(pairs):.3f} to "
        f"{max(pairs):.3f}; fastest steps {min(steps('ours')) * 1e3:.0f} and "
        f"{min(steps('peer')) * 1e3:.0f} ms, ratio {min(steps('ours')) / min(steps('peer')):.3f}"
    )

    print_result(
        forward_backward_ratio=parts["ours fb"].cpu_seconds / parts["peer fb"].cpu_seconds,
        optimizer_ratio=parts["ours optimizer"].cpu_seconds / parts["peer optimizer"].cpu_seconds,
        total_ratio=total("ours") / total("peer"),
        ours_ms=total("ours") * 1e3,
        peer_ms=total("peer") * 1e3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="k2-tiny")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--seq", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    preset = without_yarn(get_preset(arguments.preset))
    batch, seq = arguments.batch, arguments.seq
    tokens = torch.randint(preset.vocab_size, (arguments.rounds + 1, batch, seq + 1))
    batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]

    from transformers import DeepseekV3Config

    config = DeepseekV3Config(**hf_config(preset, model_type="deepseek_v3"))
    with machine_lock(), one_rank():
        print_inputs(**vars(arguments))
        torch.set_flush_denormal(True)
        peer = Peer(config, LR, DECAY)
        chosen = choose_implementation(peer, *batches[0])
        peer.use(*chosen)
        print(f"peer: transformers DeepseekV3ForCausalLM, attention/experts {'/'.join(chosen)}")
        with megatron_host():
            ours = Ours(preset, batch, seq, peer)
        clock = run(ours, peer, batches, arguments.seed)
        report(clock, preset, peer, batch, seq)


if __name__ == "__main__":
    main()
