"""A crowd at the server over the embedded engine: none lost, none given another's answer.

A real uvicorn, a small random model, greedy answers of 16 tokens. Every fifth client leaves after a
random moment. What each answer must be was computed beforehand, a request at a time; where one
differs, its first token apart must be as likely as the expected one to 1e-4. Memory is that of the
process, after the first tenth and at the end.

    python tests/campaigns/serve_crowd.py [--requests 10000] [--at-once 1000] [--seed 0]
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx2 as httpx
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.protocol import Request, SamplingParams
from tests.engine.local.models import TINY, reference, weights_of
from tests.engine.server.served import served, settled, tokenizer_in

NEW, SHARE_LEAVING, NUM_PROMPTS = 16, 0.2, 500
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)


def core_of(model: torch.nn.Module, num_slots: int) -> Core:
    """An engine's core of the model."""
    return Core(weights_of(model, TINY), num_slots=num_slots, max_length=96)


def expected(model: torch.nn.Module, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Answers, one request at a time, nothing shared."""
    core, found = core_of(model, 1), []
    for prompt in prompts:
        core.scheduler.forget()
        core.add(Request("a", prompt, GREEDY))
        answer: list[int] = []
        while core.has_work:
            answer += [t.id for _, output in core.step() for t in output.tokens]
        found.append(answer)
    return found


@torch.inference_mode()
def is_near_tie(
    model: torch.nn.Module, prompt: tuple[int, ...], found: list[int], wanted: list[int]
) -> bool:
    """Whether the first token apart is as likely as the expected one."""
    place = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    logits = model(torch.tensor([[*prompt, *wanted[:place]]])).logits[0, -1]
    return bool((logits[found[place]] - logits[wanted[place]]).abs() < 1e-4)


async def crowd(
    url: str, prompts: list[tuple[int, ...]], options: argparse.Namespace
) -> tuple[list[tuple[int, list[int] | str]], int]:
    """(prompt, answer or what became of it) of each request; memory after the first tenth."""
    draw, gate = random.Random(options.seed), asyncio.Semaphore(options.at_once)
    limits = httpx.Limits(max_connections=options.at_once)
    done, early = 0, 0
    async with httpx.AsyncClient(limits=limits, timeout=300) as client:

        async def one(number: int, leaves_after: float | None) -> tuple[int, list[int] | str]:
            nonlocal done, early
            prompt = number % len(prompts)
            body = {
                "prompt": list(prompts[prompt]),
                "max_tokens": NEW,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            async with gate:
                work = client.post(f"{url}/v1/completions", json=body)
                try:
                    answer = await asyncio.wait_for(work, leaves_after)
                except TimeoutError:
                    return prompt, "left"
                finally:
                    done += 1
                    if done == options.requests // 10:
                        early = psutil.Process().memory_info().rss
            if answer.status_code != 200:
                return prompt, f"status {answer.status_code}: {answer.text[:200]}"
            return prompt, answer.json()["choices"][0]["token_ids"]

        plans = [
            draw.uniform(0.0, 2.0) if draw.random() < SHARE_LEAVING else None
            for _ in range(options.requests)
        ]
        ends = await asyncio.gather(*(one(i, plan) for i, plan in enumerate(plans)))
    return ends, early


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=1_000)
    parser.add_argument("--num-slots", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, model = random.Random(f"{options.seed} prompts"), reference(TINY)
    prompts = [
        tuple(draw.randrange(TINY.vocab_size) for _ in range(draw.randint(1, 60)))
        for _ in range(NUM_PROMPTS)
    ]
    wanted = expected(model, prompts)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_in(Path(folder))
        make = lambda: LocalEngine(core_of(model, options.num_slots))  # noqa: E731
        with served(make, tokenizer) as (url, service):
            begin = time.monotonic()
            ends, early = asyncio.run(crowd(url, prompts, options))
            seconds = time.monotonic() - begin
            is_settled = settled(service)
            late = psutil.Process().memory_info().rss
    kinds: Counter[str] = Counter()
    for prompt, end in ends:
        if isinstance(end, str):
            kinds[end] += 1
        elif end == wanted[prompt]:
            kinds["right"] += 1
        else:
            near = is_near_tie(model, prompts[prompt], end, wanted[prompt])
            kinds["near-tie" if near else "wrong"] += 1
    for kind, count in kinds.most_common():
        print(f"  {kind:<12} {count:>6}")
    print(
        f"seed {options.seed}: {options.requests:,} requests, {options.at_once:,} at once, "
        f"{seconds:.0f} s ({options.requests / seconds:,.0f} a second); memory "
        f"{early / 2**20:,.0f} MiB after a tenth, {late / 2**20:,.0f} at the end; nothing in "
        f"flight: {is_settled}"
    )
    return 0 if is_settled and kinds.keys() <= {"right", "near-tie", "left"} else 1


if __name__ == "__main__":
    sys.exit(main())
