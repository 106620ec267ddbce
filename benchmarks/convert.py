"""Import and export of a generated Hugging Face directory, beside ``cp`` of the same bytes.

Prints seconds and GB/s of source bytes of: cp, import, export to bf16, and for an FP8 source export
to fp8; and the peak anonymous memory (RssAnon) of the converting process above its imports.
``--slice`` generates layers of Kimi K2's own width instead (hidden 7168, one dense layer, one with
``--experts`` experts); ``--vocab`` keeps embedding and head from filling the disk.

    python benchmarks/convert.py
    python benchmarks/convert.py --slice --fp8 --experts 16 --vocab 163840      (13 GB of disk)

Megatron-Bridge 0.6.2 measured on an 895-tensor bf16 model of 0.89 GB, on two CPU cores: 4.4 s in,
1.6 s out, 54-110 s of start-up, 2.27 GiB peak. It is not installed with this project.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import machine_lock, print_inputs, print_result

from megatron_k2.checkpoint import fp8
from megatron_k2.checkpoint.audit import released_shapes
from megatron_k2.checkpoint.export import ExportOptions, export
from megatron_k2.checkpoint.hf_config import hf_config
from megatron_k2.checkpoint.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.safetensors_stream import TensorSlot, write_safetensors
from megatron_k2.planning.params import count_parameters
from megatron_k2.presets import K2_TINY, KIMI_K2, ModelPreset

ANCHOR = dataclasses.replace(
    K2_TINY,
    num_layers=9,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=256,
    qk_head_dim=64,
    qk_pos_emb_head_dim=32,
    v_head_dim=64,
    num_moe_experts=32,
    moe_ffn_hidden_size=512,
    vocab_size=4096,
)
"""About what Megatron-Bridge was measured on: 895 tensors, 9 layers of width 1024, 32 experts."""


def generate(directory: Path, preset: ModelPreset, is_fp8: bool) -> None:
    """A release of random weights, written a tensor at a time; one random block is repeated."""
    directory.mkdir()
    slots = []
    for name, shape in released_shapes(preset).items():
        is_bias = name.endswith("e_score_correction_bias")
        dtype = torch.float32 if is_bias else torch.bfloat16
        if is_fp8 and fp8.is_quantized(name):
            dtype = fp8.E4M3
            scales = TensorSlot(name + fp8.SCALE_SUFFIX, fp8.scale_shape(shape), torch.float32)
            slots.append(scales)
        slots.append(TensorSlot(name, shape, dtype))
    slots.sort(key=lambda slot: -slot.dtype.itemsize)
    noise = (torch.randn(4 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    codes = (noise.float() * (448 / noise.float().abs().max())).to(fp8.E4M3)

    def tensors() -> Iterator[torch.Tensor]:
        for slot in slots:
            count = slot.num_bytes // slot.dtype.itemsize
            if slot.dtype == torch.float32:
                yield torch.full(slot.shape, 1e-4)
                continue
            block = (codes if slot.dtype == fp8.E4M3 else noise).view(torch.uint8)
            need = count * slot.dtype.itemsize
            yield block.repeat(-(-need // len(block)))[:need].view(slot.dtype).view(slot.shape)

    write_safetensors(directory / "model.safetensors", slots, tensors())
    config = hf_config(preset)
    if is_fp8:
        config["quantization_config"] = fp8.QUANTIZATION_CONFIG
    (directory / "config.json").write_text(json.dumps(config))


def rss_anon_bytes() -> int:
    """Anonymous memory of this process now: mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def measured(call: Callable[[], object]) -> tuple[float, float, int]:
    """Wall and CPU seconds of ``call``, and its peak anonymous bytes above those at its start."""
    before, peak, is_over = rss_anon_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.005):
            peak = max(peak, rss_anon_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    is_over.set()
    watcher.join()
    return wall, cpu, max(0, peak - before)


def copy(source: Path, target: Path) -> None:
    """``cp`` and flush, as the conversions flush."""
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)


def start_up_seconds() -> float:
    """Of the command, to the point where it could begin."""
    started = time.perf_counter()
    code = "import megatron_k2.checkpoint.import_hf, megatron_k2.checkpoint.imported_args as a; "
    code += "import megatron.training.arguments"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slice", action="store_true", help="K2's width: two layers of it")
    parser.add_argument("--fp8", action="store_true", help="block-FP8 source")
    parser.add_argument("--experts", type=int, default=4, help="of the slice's expert layer")
    parser.add_argument("--vocab", type=int, default=4096, help="of the slice")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    preset = ANCHOR
    if arguments.slice:
        preset = dataclasses.replace(
            KIMI_K2, num_layers=2, num_moe_experts=arguments.experts, vocab_size=arguments.vocab
        )
    with machine_lock(), tempfile.TemporaryDirectory() as folder:
        print_inputs(**vars(arguments), preset=preset.name)
        run(Path(folder), preset, arguments.fp8, arguments.rounds)


def run(folder: Path, preset: ModelPreset, is_fp8: bool, rounds: int) -> None:
    source, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    generate(source, preset, is_fp8)
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    dtype = "fp8" if is_fp8 else "bf16"
    imports, exports = ImportOptions(), ExportOptions(dtype=dtype)
    warm = folder / "warm"
    generate(warm, dataclasses.replace(K2_TINY, vocab_size=64), is_fp8)
    import_hf(warm, folder / "warmed", imports)  # Megatron's import is start-up, not conversion
    start_up = start_up_seconds()
    calls = {
        "cp": (lambda: copy(source, folder / "copy"), [folder / "copy"]),
        "import": (lambda: import_hf(source, megatron, imports), []),
        "export": (lambda: export(megatron, back, exports), [megatron, back]),
    }
    best: dict[str, tuple[float, float, int]] = {}
    for _ in range(rounds):
        for name, (call, made) in calls.items():
            found = measured(call)
            best[name] = min(best.get(name, found), found)
            for path in made:
                shutil.rmtree(path)
    report(preset, num_bytes, best, start_up)


def report(
    preset: ModelPreset,
    num_bytes: int,
    best: dict[str, tuple[float, float, int]],
    start_up: float,
) -> None:
    print(f"source: {num_bytes / 1e9:.3f} GB; start-up {start_up:.1f} s")
    print("| what | wall s | CPU s | GB/s of source | of cp | peak RssAnon above imports, MiB |")
    print("|---|---|---|---|---|---|")
    for name, (wall, cpu, peak) in best.items():
        rate = num_bytes / wall / 1e9
        share = best["cp"][0] / wall
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {rate:.2f} | {share:.2f} | {peak >> 20} |")
    elements = count_parameters(preset).total
    scale = count_parameters(KIMI_K2).total / elements
    print(
        f"kimi-k2 at these rates, one process: import {best['import'][0] * scale / 3600:.1f} h, "
        f"export {best['export'][0] * scale / 3600:.1f} h; 2.05 TB as bf16"
    )
    print_result(
        gigabytes=num_bytes / 1e9,
        cp_seconds=best["cp"][0],
        import_seconds=best["import"][0],
        export_seconds=best["export"][0],
        start_up_seconds=start_up,
        peak_mib=max(best["import"][2], best["export"][2]) >> 20,
    )


if __name__ == "__main__":
    main()
