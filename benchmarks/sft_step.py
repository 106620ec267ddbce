"""A fine-tuning step: packed documents against padded batches, ours and transformers'.

The same samples three ways: packs through our attention; one sample a row, padded to the longest,
through the same model; and that through transformers' ``DeepseekV3ForCausalLM`` in the fastest of
its implementations. Lengths are log-normal, the second half of each sample is trained on. Useful
tokens are those of samples, trained or context; padding is not. The ceiling of packing is the
padded batches' arithmetic over the packs'; forward and backward, one thread, fp32, CPU seconds,
medians over interleaved rounds. The three losses must agree.

A micro-batch has a cost of its own (about 40 ms of CPU for ``k2-tiny``), which the ceiling does not
know. Packs of 2,048 rows are about as many as the padded batches; 48 samples in packs of 1,024 were
9 packs against 6 batches, and 0.87 to 0.91 of the ceiling.

    python benchmarks/sft_step.py --samples 96 --rows 2048
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from harness import machine_lock, paired_medians, print_inputs, print_result
from plain_torch_peer import Peer
from torch import Tensor
from train_step import DECAY, LOSS_TOLERANCE, LR, Ours, choose_implementation, one_rank

from megatron_k2.checkpoint.hf.config import hf_config, without_yarn
from megatron_k2.host.cpu import megatron_host
from megatron_k2.planning.cost.flops import model_flops_per_token
from megatron_k2.presets import ModelPreset, get_preset
from megatron_k2.sft.dataset import PackShape, rows_of
from megatron_k2.sft.packed_set import PackedSequence
from megatron_k2.sft.packing import pack

MEDIAN_TOKENS, SPREAD = 200, 0.8
"""Of the lengths; e^0.8 is one standard deviation. Ours."""
PADDED_ROWS = 8
"""Samples of a padded batch."""
FLAGS = (
    "--sft-data memory --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
    "--moe-router-bias-update-rate 0"
).split()


def samples(number: int, longest: int, vocab_size: int, seed: int) -> list[Tensor]:
    """Token ids of each, [its length]."""
    lengths = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SPREAD, number)
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(vocab_size, (int(n),), generator=generator)
        for n in lengths.clip(8, longest + 1)
    ]


def packed_batches(ids: list[Tensor], rows: int) -> list[dict[str, Tensor]]:
    """The samples as a data loader hands them over, a pack each."""
    lengths = np.array([len(one) for one in ids])
    packs = pack(lengths, rows)
    found = []
    for members in (packs[i] for i in range(len(packs))):
        here = [ids[i].numpy().astype(np.int32) for i in members]
        masks = [(np.arange(len(one)) >= len(one) // 2).astype(np.uint8) for one in here]
        sequence = PackedSequence(
            tokens=np.concatenate(here),
            loss_mask=np.concatenate(masks),
            lengths=lengths[members],
            weights=np.ones(len(here), np.float32),
        )
        batch = rows_of(sequence, PackShape(rows))
        found.append({name: value[None] for name, value in batch.items()})
    return found


def padded_batches(ids: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, labels and loss mask, ``PADDED_ROWS`` samples at a time in the order they came."""
    found = []
    for start in range(0, len(ids), PADDED_ROWS):
        here = ids[start : start + PADDED_ROWS]
        width = max(map(len, here)) - 1
        tokens, labels, mask = (torch.zeros(len(here), width, dtype=torch.long) for _ in range(3))
        for row, one in enumerate(here):
            n = len(one) - 1
            tokens[row, :n], labels[row, :n] = one[:-1], one[1:]
            mask[row, max(0, len(one) // 2 - 1) : n] = 1
        found.append((tokens, labels, mask.float()))
    return found


def ours_packed(ours: Ours, batches: list[dict[str, Tensor]], rows: int) -> float:
    """One step's gradients from packs; the mean loss of the targets."""
    from megatron.core import mpu

    from megatron_k2.sft.batch import next_batch, weighted_loss

    def forward_step(iterator: Iterator, model: torch.nn.Module):  # noqa: ANN202
        batch = next_batch(iterator, mpu.get_context_parallel_group(), "token")
        output = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed,
        )
        return output, partial(weighted_loss, batch.loss_mask, batch.num_counted)

    return ours.run(forward_step, batches, 1, rows)


def ours_padded(ours: Ours, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The same from padded batches."""
    from megatron_k2.training.providers import loss_func

    def forward_step(iterator: Iterator, model: torch.nn.Module):  # noqa: ANN202
        tokens, labels, mask = next(iterator)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None, labels=labels), partial(loss_func, mask)

    return ours.run(forward_step, batches, PADDED_ROWS, batches[0][0].shape[1])


def peer_padded(peer: Peer, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The same in transformers' plain loop: a mean over the targets of all batches."""
    peer.model.zero_grad(set_to_none=True)
    count = float(sum(mask.sum() for _, _, mask in batches))
    total = 0.0
    for tokens, labels, mask in batches:
        logits = peer.model(tokens, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (losses * mask.flatten()).sum() / count
        loss.backward()
        total += loss.item()
    return total


def arithmetic(preset: ModelPreset, shapes: list[tuple[int, list[int]]]) -> float:
    """FLOPs of rows with the documents that attention works on: (rows, lengths) of each batch."""
    whole, none = model_flops_per_token(preset, 1), 0.0
    slope = model_flops_per_token(preset, 2) - whole
    return sum(
        rows * whole + slope * sum(n * (n - 1) for n in lengths) + none for rows, lengths in shapes
    )


def measured(
    ours: Ours, peer: Peer, ids: list[Tensor], rows: int, rounds: int, seed: int
) -> dict[str, float]:
    """CPU seconds a step of each of the three."""
    packs, padded = packed_batches(ids, rows), padded_batches(ids)
    losses: dict[str, float] = {}

    def in_megatron(name: str, call: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            with megatron_host():
                losses[name] = call()

        return run

    def plain() -> None:
        torch.set_flush_denormal(True)
        losses["peer"] = peer_padded(peer, padded)

    candidates = {
        "packed": in_megatron("packed", lambda: ours_packed(ours, packs, rows)),
        "padded": in_megatron("padded", lambda: ours_padded(ours, padded)),
        "peer": plain,
    }
    timings = paired_medians(candidates, rounds, seed)
    print("losses: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
        raise SystemExit("the three are not the same step")
    for name, timing in timings.items():
        print(f"{name}: {timing.cpu_seconds * 1e3:.0f} ms CPU, spread {timing.spread:.2f}")
    return {name: timing.cpu_seconds for name, timing in timings.items()}


def report(preset: ModelPreset, ids: list[Tensor], rows: int, seconds: dict[str, float]) -> None:
    """Useful tokens a second, and the ratios with their ceiling."""
    packs, padded = packed_batches(ids, rows), padded_batches(ids)
    useful = sum(len(one) - 1 for one in ids)
    in_packs = [(rows, batch["lengths"][0].tolist()) for batch in packs]
    in_rows = [(tokens.numel(), [tokens.shape[1]] * len(tokens)) for tokens, _, _ in padded]
    ceiling = arithmetic(preset, in_rows) / arithmetic(preset, in_packs)
    num_rows, num_padded = rows * len(packs), sum(tokens.numel() for tokens, _, _ in padded)
    print(
        f"useful tokens {useful:,}: {useful / num_rows:.1%} of {num_rows:,} rows of packs, "
        f"{useful / num_padded:.1%} of {num_padded:,} padded ones; ceiling {ceiling:.2f}x"
    )
    ratios = {name: seconds[name] / seconds["packed"] for name in ("padded", "peer")}
    for name, ratio in ratios.items():
        print(f"packed against {name}: {ratio:.2f}x, {ratio / ceiling:.2f} of the ceiling")
    print_result(
        packed_tokens_per_second=useful / seconds["packed"],
        padded_tokens_per_second=useful / seconds["padded"],
        peer_tokens_per_second=useful / seconds["peer"],
        ceiling=ceiling,
        padded_ratio=ratios["padded"],
        padded_of_ceiling=ratios["padded"] / ceiling,
        peer_ratio=ratios["peer"],
        peer_of_ceiling=ratios["peer"] / ceiling,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="k2-tiny")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rows", type=int, default=2048, help="of a pack")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    preset, rows = without_yarn(get_preset(arguments.preset)), arguments.rows
    ids = samples(arguments.samples, rows, preset.vocab_size, arguments.seed)

    from transformers import DeepseekV3Config

    config = DeepseekV3Config(**hf_config(preset, model_type="deepseek_v3"))
    with machine_lock(), one_rank():
        print_inputs(**vars(arguments))
        torch.set_flush_denormal(True)
        peer = Peer(config, LR, DECAY)
        first = padded_batches(ids)[0]
        chosen = choose_implementation(peer, first[0], first[1])
        peer.use(*chosen)
        print(f"peer: transformers DeepseekV3ForCausalLM, attention/experts {'/'.join(chosen)}")
        with megatron_host():
            ours = Ours(preset, 1, rows, peer, tuple(FLAGS))
        seconds = measured(ours, peer, ids, rows, arguments.rounds, arguments.seed)
        report(preset, ids, rows, seconds)


if __name__ == "__main__":
    main()
