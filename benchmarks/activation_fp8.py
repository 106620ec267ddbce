"""1x128 FP8 tiles on a CPU against the memory-bandwidth floor: eager, torch.compile, and C.

The floor of a direction is the bytes it reads and writes at the rate of a plain copy of the same
input, measured in the same rounds; the aim is to quantise at a third of it. All give the same bytes
(asserted). C is what a training run on a CPU uses (its host turns torch.compile off); on a GPU a
Triton kernel does it, not measured here.

    python benchmarks/activation_fp8.py --rows 4096 --width 2048 --dtype float32
"""

import argparse
from collections.abc import Callable

import torch
from harness import machine_lock, paired_medians, print_inputs, print_result
from torch import Tensor

from megatron_k2.fp8 import native_tiles
from megatron_k2.fp8.tiles import dequantize_tiles, quantize_tiles, stored_bytes

WANTED_SHARE_OF_FLOOR = 1 / 3


def check_same_bytes(x: Tensor, *others: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Codes and scales of all implementations, byte by byte."""
    for other in others:
        for a, b in zip(quantize_tiles(x), other(x), strict=True):
            if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                raise SystemExit("two ways of quantisation give different bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(arguments.seed)
    x = torch.randn(arguments.rows, arguments.width, generator=generator).to(dtype)

    quantize = torch.compile(quantize_tiles)
    dequantize = torch.compile(dequantize_tiles)
    if not native_tiles.is_available(dtype):
        raise SystemExit("no C compiler here: set CC to one")
    check_same_bytes(x, quantize, native_tiles.quantize_tiles)
    codes, scales = quantize_tiles(x)
    destination = torch.empty_like(x)
    candidates: dict[str, Callable[[], object]] = {
        "copy": lambda: destination.copy_(x),
        "quantize_eager": lambda: quantize_tiles(x),
        "quantize_compiled": lambda: quantize(x),
        "quantize_c": lambda: native_tiles.quantize_tiles(x),
        "dequantize_eager": lambda: dequantize_tiles(codes, scales, dtype),
        "dequantize_compiled": lambda: dequantize(codes, scales, dtype),
        "dequantize_c": lambda: native_tiles.dequantize_tiles(codes, scales, dtype),
    }
    with machine_lock():
        print_inputs(**vars(arguments))
        timings = paired_medians(candidates, arguments.rounds, arguments.seed)
    report(x, {name: timing.cpu_seconds for name, timing in timings.items()})


def report(x: Tensor, seconds: dict[str, float]) -> None:
    moved = x.nbytes + stored_bytes(*x.shape)
    rate = {name: moved / t / 1e9 for name, t in seconds.items()}
    rate["copy"] = 2 * x.nbytes / seconds["copy"] / 1e9
    print("| operation | CPU ms | GB/s read and written | of the floor |")
    print("|---|---|---|---|")
    for name, t in seconds.items():
        print(f"| {name} | {t * 1e3:.2f} | {rate[name]:.1f} | {rate[name] / rate['copy']:.2f} |")
    share = rate["quantize_c"] / rate["copy"]
    print_result(
        floor_gbps=rate["copy"],
        quantize_eager_gbps=rate["quantize_eager"],
        quantize_compiled_gbps=rate["quantize_compiled"],
        quantize_gbps=rate["quantize_c"],
        dequantize_gbps=rate["dequantize_c"],
        quantize_share_of_floor=share,
        wanted=WANTED_SHARE_OF_FLOOR,
        is_met=share >= WANTED_SHARE_OF_FLOOR,
    )


if __name__ == "__main__":
    main()
