"""Rollouts of the embedded engine against vLLM's CPU build, each in a process of its own, in turns.

Greedy, fp32, one thread each, log-probabilities of the sampled tokens on either side, YaRN on,
medians of CPU seconds. vLLM runs in the environment of ``make vllm-venv``. Two shapes: k2-mini with
heads of 64 + 32 (vLLM's kernels have none of its 72), for which vLLM expands latents, and k2-mini
with latents of 512 + 64, the only ones that its MLA kernel takes, for which it runs that.

What handicaps either: vLLM compiles nothing here (``enforce_eager``), runs torch's rotary and norms
instead of its own operators, one of which is silently wrong on a CPU, and its tables and scheduler
are made for a GPU's rates; the embedded engine has no kernels of its own at all, knows one model,
and decodes whole slots where vLLM has pages.

    python benchmarks/rollout_vllm.py [--shapes mini mla] [--prompts 64 512] [--new 128] [--seed 0]
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import machine_lock, print_inputs, print_result, summarize
from rollout import check_same, engine_rollout, peer_of, shape_of
from safetensors.torch import save_file

from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import SamplingParams
from megatron_k2.presets import ModelPreset

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SHAPES: dict[str, dict[str, int]] = {
    "mini": {"qk_head_dim": 64, "qk_pos_emb_head_dim": 32, "v_head_dim": 64},
    "mla": {
        "kv_lora_rank": 512,
        "qk_pos_emb_head_dim": 64,
        "qk_head_dim": 128,
        "v_head_dim": 128,
    },
}


class Peer:
    """A vLLM over a directory; ``with`` ends its process."""

    def __init__(self, directory: Path, shape: str, batch: int, length: int, log: Path) -> None:
        python = os.environ.get("VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))
        if not Path(python).exists():
            sys.exit(f"{python} is not there: run make vllm-venv, or name another in VLLM_PYTHON")
        program = str(Path(__file__).with_name("rollout_vllm_peer.py"))
        own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS
        own |= {"VLLM_MLA_DISABLE": "0" if shape == "mla" else "1"}
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [python, program, str(directory), str(batch), str(length)],
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._path = log
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        sys.exit(f"vLLM ended: {self._path.read_text()[-3000:]}")

    def rollout(self, prompts: list[tuple[int, ...]], new: int) -> dict[str, Any]:
        """Tokens, log-probabilities, (wall, CPU) seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


def timed(call: Callable[[], tuple]) -> tuple[tuple, tuple[float, float]]:
    """What it returns, and (wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return found, (time.perf_counter() - wall, time.process_time() - cpu)


def write(preset: ModelPreset, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Random weights as a Hugging Face directory; the tensors."""
    tensors = classic_from_transformers(peer_of(preset, None, seed).state_dict())
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = hf_config(preset, model_type="deepseek_v3", dtype="fp32")
    (folder / "config.json").write_text(json.dumps(config))
    return kept


def of_shape(name: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Ratios at every length of prompt."""
    length = max(options.prompts) + options.new + 1
    preset = replace(shape_of("k2-mini", None, length), **SHAPES[name])
    tensors = write(preset, folder, options.seed)
    weights = Weights(preset, torch.float32, torch.device("cpu"))
    weights.load(tensors.items())
    core = Core(weights, num_slots=options.batch, max_length=length)
    results = {}
    with Peer(folder, name, options.batch, length, folder / "vllm.log") as peer:
        for prompt in options.prompts:
            results[f"{name}_prompt_{prompt}"] = at_length(name, prompt, core, peer, options)
    return results


def at_length(name: str, prompt: int, core: Core, peer: Peer, options: argparse.Namespace) -> float:
    """Rounds in turns, the first unmeasured; the ratio of CPU seconds."""
    generator = torch.Generator().manual_seed(options.seed + prompt)
    shape = (options.batch, prompt)
    drawn = torch.randint(4, core.weights.preset.vocab_size, shape, generator=generator)
    prompts = [tuple(row) for row in drawn.tolist()]
    params = SamplingParams(temperature=0, max_tokens=options.new)
    order, samples = random.Random(options.seed), {"engine": [], "vLLM": []}
    for number in range(options.rounds + 1):
        for who in order.sample(["engine", "vLLM"], 2):
            if who == "engine":
                ours, seconds = timed(lambda: engine_rollout(core, prompts, params))
            else:
                theirs = peer.rollout(prompts, options.new)
                seconds = tuple(theirs["seconds"])
            if number:
                samples[who].append(seconds)
    check_same(ours, (theirs["ids"], theirs["scores"]))
    timings = {who: summarize(values) for who, values in samples.items()}
    for who, timing in timings.items():
        rate = options.batch * options.new / timing.cpu_seconds
        print(
            f"{name}, prompt {prompt}, {who}: {rate:,.0f} tokens a CPU second, spread "
            f"{timing.spread:.2f}"
        )
    ratio = timings["vLLM"].cpu_seconds / timings["engine"].cpu_seconds
    print(f"{name}, prompt {prompt}: {ratio:.2f}x vLLM", flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with machine_lock(), torch.inference_mode(), tempfile.TemporaryDirectory() as root:
        print_inputs(**vars(options))
        results = {}
        for name in options.shapes:
            folder = Path(root) / name
            folder.mkdir()
            results |= of_shape(name, options, folder)
        print_result(**results)


if __name__ == "__main__":
    main()
