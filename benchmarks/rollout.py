"""Rollouts of the embedded engine against ``transformers.generate`` on the same weights.

Greedy, fp32, log-probabilities of the sampled tokens on either side, YaRN on; interleaved in one
process with one thread, medians of CPU seconds. Beside it: K samples of one prompt with and without
sharing its rows, with the ceiling that prefill and decode seconds leave; and the floor of a decode
step, the bytes of weights and cache it must read over the memory's measured bandwidth, and its
products with weights over the peak of a large one. Where asked for: what the batch-invariant mode
costs, its answers in the batch compared with each alone; and what several processes bring
(``rollout_processes.py``).

    python benchmarks/rollout.py [--load HF_DIR] [--preset k2-mini] [--seed 0]
    python benchmarks/rollout.py --prompts --samples 0 --invariant 64 512 --processes 2
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from harness import machine_lock, paired_medians, print_inputs, print_result
from rollout_processes import of_processes

from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.hf.preset import preset_from_hf
from megatron_k2.checkpoint.hf.reader import read_json
from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import Request, SamplingParams
from megatron_k2.presets import ModelPreset, YarnScaling, get_preset

NEAR_TIE = 1e-3
YARN = YarnScaling(8.0, 512, 1.0, 1.0, 1.0, 1.0)


def shape_of(preset_name: str, load: Path | None, length: int) -> ModelPreset:
    """The model's shape, with YaRN and room for ``length`` tokens."""
    found = preset_from_hf(read_json(load / "config.json")) if load else get_preset(preset_name)
    return replace(found, yarn=YARN, max_position_embeddings=max(length, 4096))


def peer_of(preset: ModelPreset, load: Path | None, seed: int) -> torch.nn.Module:
    """The peer: of a directory's weights, or random ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**hf_config(preset, model_type="deepseek_v3"))
    torch.manual_seed(seed)
    if load:
        return DeepseekV3ForCausalLM.from_pretrained(
            load, config=config, dtype=torch.float32
        ).eval()
    return DeepseekV3ForCausalLM(config).float().eval()


def engine_rollout(
    core: Core, prompts: list[tuple[int, ...]], params: SamplingParams
) -> tuple[list[list[int]], list[list[float]]]:
    """Answers and their log-probabilities; no row of an earlier rollout is taken over."""
    core.scheduler.forget()
    found: dict[str, list] = {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(found, prompts, strict=True):
        core.add(Request(name, prompt, params))
    while core.has_work:
        for name, output in core.step():
            found[name] += output.tokens
    tokens = list(found.values())
    return [[t.id for t in row] for row in tokens], [[t.logprob for t in row] for row in tokens]


def peer_rollout(
    model: torch.nn.Module, prompts: list[tuple[int, ...]], new: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Answers and their log-probabilities, of ``transformers.generate``."""
    ids = torch.tensor(prompts)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = out.sequences[:, ids.shape[1] :]
    logits = torch.stack(out.logits, 1)
    scores = logits.log_softmax(-1).gather(2, answers[..., None])[..., 0]
    return answers.tolist(), scores.tolist()


def check_same(ours: tuple, theirs: tuple) -> None:
    """Equal tokens with equal log-probabilities up to a row's first near-tie."""
    same, apart, worst = 0, 0, 0.0
    for ids, scores, peer_ids, peer_scores in zip(*ours, *theirs, strict=True):
        for place, (a, b) in enumerate(zip(ids, peer_ids, strict=True)):
            worst = max(worst, abs(scores[place] - peer_scores[place]))
            if a != b:
                apart += 1
                break
        else:
            same += 1
    print(f"greedy: {same} rows equal, {apart} part at a near-tie; log-probabilities {worst:.1e}")
    if worst > NEAR_TIE:
        raise SystemExit("the two are not the same model")


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 256 MiB, the best of five."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)

    def seconds() -> float:
        begin = time.process_time()
        target.copy_(source)
        return time.process_time() - begin

    return 2 * source.numel() * 4 / min(seconds() for _ in range(5))


def gemm_peak() -> float:
    """FLOP a second of a large product, the best of five."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def seconds() -> float:
        begin = time.process_time()
        a @ b
        return time.process_time() - begin

    return 2 * 1024**3 / min(seconds() for _ in range(5))


def print_floor(core: Core, batch: int, prompt: int, new: int) -> None:
    """What reading alone, and the products with weights alone, leave of a decode step."""
    p = core.weights.preset
    expert = 3 * p.hidden_size * p.moe_ffn_hidden_size * 4
    missed = (1 - p.moe_router_topk / p.num_moe_experts) ** batch
    unread = p.num_moe_layers * p.num_moe_experts * missed * expert
    row = p.num_layers * (p.kv_lora_rank + p.qk_pos_emb_head_dim) * 4
    read = core.weights.num_bytes - p.vocab_size * p.hidden_size * 4 - unread
    read += batch * (prompt + new / 2) * row
    bandwidth, peak = copy_bandwidth(), gemm_peak()
    idle = p.num_moe_layers * (p.num_moe_experts - p.moe_router_topk) * expert
    work = (core.weights.num_bytes - p.vocab_size * p.hidden_size * 4 - idle) / 4 * 2
    print(
        f"floor: {read / 1e6:.1f} MB a step over {bandwidth / 1e9:.1f} GB/s = "
        f"{batch * bandwidth / read:,.0f} tokens a second; {work / 1e6:.1f} MFLOP a token over "
        f"{peak / 1e9:.0f} GFLOP/s = {peak / work:,.0f}"
    )


def against_the_peer(
    core: Core, model: torch.nn.Module, prompt: int, options: argparse.Namespace
) -> float:
    """Ratio of CPU seconds at one length of prompt."""
    generator = torch.Generator().manual_seed(options.seed + prompt)
    vocab = core.weights.preset.vocab_size
    shape = (options.batch, prompt)
    prompts = [tuple(row) for row in torch.randint(4, vocab, shape, generator=generator).tolist()]
    params = SamplingParams(temperature=0, max_tokens=options.new)
    answers: dict[str, tuple] = {}

    def keeping(name: str, call: Callable[[], tuple]) -> Callable[[], None]:
        def run() -> None:
            answers[name] = call()

        return run

    candidates = {
        "engine": keeping("engine", lambda: engine_rollout(core, prompts, params)),
        "peer": keeping("peer", lambda: peer_rollout(model, prompts, options.new)),
    }
    timings = paired_medians(candidates, options.rounds, options.seed)
    check_same(answers["engine"], answers["peer"])
    print_floor(core, options.batch, prompt, options.new)
    for name, timing in timings.items():
        rate = options.batch * options.new / timing.cpu_seconds
        print(
            f"prompt {prompt} {name}: {rate:,.0f} tokens a CPU second, spread {timing.spread:.2f}"
        )
    ratio = timings["peer"].cpu_seconds / timings["engine"].cpu_seconds
    print(f"prompt {prompt}: {ratio:.2f}x", flush=True)
    return ratio


def of_sharing(core: Core, options: argparse.Namespace) -> tuple[float, float]:
    """K samples of one prompt with and without sharing, and the ceiling of that ratio."""
    generator = torch.Generator().manual_seed(options.seed)
    vocab, length, new = core.weights.preset.vocab_size, 1024, 64
    prompt = tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())
    prompts = [prompt] * options.samples
    params = SamplingParams(max_tokens=new, seed=options.seed)
    apart_core = Core(
        core.weights, num_slots=options.samples, max_length=length + new, shares_prefixes=False
    )
    timings = paired_medians(
        {
            "shared": lambda: engine_rollout(core, prompts, params),
            "apart": lambda: engine_rollout(apart_core, prompts, params),
            "prefill": lambda: engine_rollout(core, [prompt], replace(params, max_tokens=1)),
        },
        options.rounds,
        options.seed,
    )
    shared, apart, prefill = (timings[n].cpu_seconds for n in ("shared", "apart", "prefill"))
    decode = shared - prefill
    ceiling = (options.samples * prefill + decode) / shared
    print(
        f"K={options.samples}, prompt {length}, {new} new: {apart / shared:.2f}x of no sharing, "
        f"ceiling {ceiling:.2f}x (prefill {prefill:.2f} s each, decode {decode:.2f} s)",
        flush=True,
    )
    return apart / shared, ceiling


def of_invariance(core: Core, length: int, options: argparse.Namespace) -> float:
    """CPU seconds of the batch-invariant mode over the default's, at one length of prompt."""
    generator = torch.Generator().manual_seed(options.seed + length)
    weights, shape = core.weights, (options.batch, length)
    drawn = torch.randint(4, weights.preset.vocab_size, shape, generator=generator)
    prompts = [tuple(row) for row in drawn.tolist()]
    params = SamplingParams(max_tokens=options.new, seed=options.seed)
    begin = time.process_time()
    invariant = Core(
        weights, num_slots=options.batch, max_length=core.max_length, is_batch_invariant=True
    )
    tried = time.process_time() - begin
    timings = paired_medians(
        {
            "default": lambda: engine_rollout(core, prompts, params),
            "invariant": lambda: engine_rollout(invariant, prompts, params),
        },
        options.rounds,
        options.seed,
    )
    together = list(zip(*engine_rollout(invariant, prompts, params), strict=True))
    same = sum(
        tuple(part[0] for part in engine_rollout(invariant, [prompt], params)) == row
        for prompt, row in zip(prompts, together, strict=True)
    )
    rates = {n: options.batch * options.new / t.cpu_seconds for n, t in timings.items()}
    cost = timings["invariant"].cpu_seconds / timings["default"].cpu_seconds
    print(
        f"batch-invariant, prompt {length}: {rates['invariant']:,.0f} tokens a CPU second, default "
        f"{rates['default']:,.0f}: {cost:.2f}x the time; {same} of {len(prompts)} rows bit-equal "
        f"alone; products tried in {tried:.2f} s",
        flush=True,
    )
    if same < len(prompts):
        raise SystemExit("the batch-invariant mode is none")
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, help="Hugging Face directory; random weights without")
    parser.add_argument("--preset", default="k2-mini")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompts", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8, help="of one prompt; 0: not measured")
    parser.add_argument(
        "--invariant", type=int, nargs="*", default=[], help="prompts at which its cost is measured"
    )
    parser.add_argument("--processes", type=int, default=1, help="1: not measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    length = max([1088, *(p + options.new for p in options.prompts + options.invariant)])
    preset = shape_of(options.preset, options.load, length)
    with machine_lock(), torch.inference_mode():
        print_inputs(**vars(options))
        torch.set_flush_denormal(True)
        model = peer_of(preset, options.load, options.seed)
        tensors = classic_from_transformers(model.state_dict())
        weights = Weights(preset, torch.float32, torch.device("cpu"))
        weights.load(tensors.items())
        core = Core(weights, num_slots=options.batch, max_length=length)
        results = {
            f"ratio_prompt_{prompt}": against_the_peer(core, model, prompt, options)
            for prompt in options.prompts
        }
        if options.samples:
            results["sharing"], results["sharing_ceiling"] = of_sharing(core, options)
        for prompt in options.invariant:
            results[f"invariant_cost_{prompt}"] = of_invariance(core, prompt, options)
        if options.processes > 1:
            results["processes"] = of_processes(core, tensors.items(), options)
        print_result(**results)


if __name__ == "__main__":
    main()
